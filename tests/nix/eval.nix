# What the module makes of a machine's configuration, as JSON: nix-instantiate --eval --strict --json eval.nix.
{
  lib ? import ./minilib.nix,
  configuration, # a module: a path
  module ? ../../packaging/nix/module.nix,
}:
let
  inherit
    (lib.evalModules {
      modules = [
        (import ./system.nix { inherit lib; })
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
  inherit (config) warnings;
  service = config.systemd.services.vllm-proxy or null;
  socket = config.systemd.sockets.vllm-proxy or null;
  etc = builtins.mapAttrs (_: file: { inherit (file) source; inherit (file.source) text; }) config.environment.etc;
  packages = map (package: package.name) config.environment.systemPackages;
  ports = config.networking.firewall.allowedTCPPorts;
  users = config.users.users;
  groups = config.users.groups;
}
