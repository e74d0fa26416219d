# A machine's options as far as the module sets them, and packages that are names alone.
{ lib }:
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
      generate = name: value: builtins.toFile name (builtins.toJSON value);
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
in
{
  options = {
    assertions = mkOption {
      type = types.listOf types.anything;
      default = [ ];
    };
    warnings = mkOption {
      type = types.listOf types.str;
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
}
