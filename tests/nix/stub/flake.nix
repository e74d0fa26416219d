# Stands for nixpkgs, as far as packaging/nix/flake.nix looks into it.
{
  outputs = _: {
    lib =
      let
        lib = import ./minilib.nix;
      in
      lib
      // {
        nixosSystem =
          { modules }: lib.evalModules { modules = [ (import ./system.nix { inherit lib; }) ] ++ modules; };
      };
    legacyPackages = (import ./minilib.nix).genAttrs [ "x86_64-linux" "aarch64-linux" ] (
      system:
      let
        lib = import ./minilib.nix;
        derivation' =
          name:
          builtins.derivation {
            inherit name system;
            builder = "/bin/sh";
          };
        python = {
          pkgs = builtins.listToAttrs (
            map (name: { inherit name; value = derivation' name; }) [
              "aiohttp" "aiohttp-swagger3" "hatchling" "httptools" "markdown-it-py" "msgspec" "nvidia-ml-py"
              "pydantic" "python-dotenv" "python-multipart" "sdnotify" "structlog" "tomli-w" "uvloop" "vllm" "watchfiles"
            ]
          ) // {
            buildPythonApplication = arguments: derivation' arguments.pname // arguments;
          };
        };
      in
      {
        callPackage =
          path: _:
          import path {
            inherit lib;
            python313.override = _: python;
            fetchPypi = _: "";
          };
        mkShell = arguments: derivation' "shell" // arguments;
        nixfmt = derivation' "nixfmt";
        python313 = derivation' "python" // { meta.mainProgram = "python3.13"; };
        uv = derivation' "uv";
        stdenv = {
          hostPlatform = { inherit system; };
          cc.cc.lib = derivation' "gcc";
        };
      }
    );
  };
}
