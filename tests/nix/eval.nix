# What the module makes of a machine's configuration, as JSON: nix-instantiate --eval --strict --json eval.nix.
{
  lib ? import ./minilib.nix,
  configuration, # a module: a path
  module ? ../../packaging/nix/module.nix,
}:
let
  inherit (lib) mkOption types;
  derivation = name: text: {
    type = "derivation";
    inherit name text;
    outPath = "/nix/store/${builtins.substring 0 32 (builtins.hashString "sha256" text)}-${name}";
  };
  pkgs = {
    formats.toml = _: {
      type = types.attrsOf types.anything;
      generate = name: value: derivation name (builtins.toJSON value);
    };
    runCommand =
      name: _: text:
      derivation name (builtins.unsafeDiscardStringContext text);
    stdenv.hostPlatform.system = "x86_64-linux";
    vllm = derivation "vllm" "" // {
      meta.mainProgram = "vllm";
    };
    vllm-proxy = derivation "vllm-proxy" "" // {
      meta.mainProgram = "vllm-proxy";
    };
  };
  anything = mkOption {
    type = types.attrsOf types.anything;
    default = { };
  };
  system = {
    options = {
      assertions = mkOption {
        type = types.listOf types.anything;
        default = [ ];
      };
      environment = {
        etc = anything;
        systemPackages = mkOption {
          type = types.listOf types.package;
          default = [ ];
        };
      };
      networking.firewall.allowedTCPPorts = mkOption {
        type = types.listOf types.int;
        default = [ ];
      };
      systemd = {
        services = anything;
        sockets = anything;
      };
      users = {
        users = anything;
        groups = anything;
      };
    };
    config._module.args = { inherit pkgs; };
  };
  inherit
    (lib.evalModules {
      modules = [
        system
        module
        configuration
      ];
    })
    config
    ;
  failed = builtins.filter (found: !found.assertion) config.assertions;
in
{
  failed = map (found: found.message) failed;
  service = config.systemd.services.vllm-proxy or null;
  socket = config.systemd.sockets.vllm-proxy or null;
  etc = builtins.mapAttrs (_: file: { inherit (file) source; inherit (file.source) text; }) config.environment.etc;
  ports = config.networking.firewall.allowedTCPPorts;
  users = config.users.users;
  groups = config.users.groups;
}
