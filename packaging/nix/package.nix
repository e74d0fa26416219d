# Not built by the project's own tests, which have no nixpkgs: they evaluate it.
{
  lib,
  python313,
  fetchPypi,
}:
let
  inherit (lib.importTOML ../../pyproject.toml) project;

  python = python313.override {
    packageOverrides = final: _: {
      # Not in nixpkgs.
      aiohttp-swagger3 = final.buildPythonPackage rec {
        pname = "aiohttp-swagger3";
        version = "0.10.0";
        pyproject = true;
        src = fetchPypi {
          pname = "aiohttp_swagger3";
          inherit version;
          hash = "sha256-ozPFkyj2TdZFh+Xydu6E3CVvWH0J8tpt2q44EvpNTzM=";
        };
        build-system = [ final.setuptools ];
        dependencies = [
          final.aiohttp
          final.attrs
          final.fastjsonschema
          final.pyyaml
          final.rfc3339-validator
        ];
        pythonRelaxDeps = [ "fastjsonschema" ];
      };
    };
  };

  # "aiohttp>=3.14,<3.15" -> aiohttp
  named = requirement: python.pkgs.${lib.head (builtins.match "([A-Za-z0-9-]+).*" requirement)};
in
python.pkgs.buildPythonApplication {
  pname = project.name;
  inherit (project) version;
  pyproject = true;

  src = lib.fileset.toSource {
    root = ../..;
    fileset = lib.fileset.unions [
      ../../LICENSE
      ../../README.md
      ../../pyproject.toml
      ../../vllm_proxy
    ];
  };

  build-system = [ python.pkgs.hatchling ];
  dependencies = map named (project.dependencies ++ project.optional-dependencies.docs);
  optional-dependencies = builtins.mapAttrs (_: map named) project.optional-dependencies;
  pythonImportsCheck = [ "vllm_proxy" ];

  meta = {
    inherit (project) description;
    license = lib.licenses.asl20;
    mainProgram = "vllm-proxy";
    platforms = [
      "x86_64-linux"
      "aarch64-linux"
    ];
  };
}
