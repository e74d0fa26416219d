# services.vllm-proxy. The unit is the one in packaging/systemd, with its drop-ins for systemd >= 254; a test compares.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.vllm-proxy;
  format = pkgs.formats.toml { };
  name = "vllm-proxy";

  # An invalid file fails the build, with every problem and its place.
  checked = pkgs.runCommand "models.toml" { } ''
    ${lib.getExe cfg.package} check --config ${format.generate "models.toml" cfg.settings}
    cp ${format.generate "models.toml" cfg.settings} $out
  '';

  isGenerated = cfg.configFile == null;
  file = if isGenerated then "/etc/${name}/models.toml" else cfg.configFile;

  server = cfg.settings.server or { };
  host = server.host or "127.0.0.1";
  port = server.port or 8000;
  isIPv6 = lib.hasInfix ":" host;
  isAddress = isIPv6 || builtins.match "[0-9]+\\.[0-9]+\\.[0-9]+\\.[0-9]+" host != null;
in
{
  options.services.vllm-proxy = {
    enable = lib.mkEnableOption "vllm-proxy, many vLLM models behind one OpenAI-compatible address";

    package = lib.mkPackageOption pkgs name { };

    settings = lib.mkOption {
      inherit (format) type;
      default = { };
      example = {
        models.chat = {
          model = "Qwen/Qwen3-8B";
          max_model_len = 16384;
        };
      };
      description = ''
        The content of models.toml. It is checked when the system is built. A rebuild that changes it reloads the
        daemon, and only the models that changed move. The REST API cannot write it: use `configFile` for that.
      '';
    };

    configFile = lib.mkOption {
      type = lib.types.nullOr lib.types.str;
      default = null;
      example = "/srv/vllm-proxy/models.toml";
      description = ''
        A file outside of the store to be used instead of `settings`: by an editor, git or the REST API. Its folder
        must exist and, for the REST API, belong to the user of the service. `settings.server.host` and `.port` may
        stand beside it, for the socket and the firewall; they win over the file.
      '';
    };

    environmentFile = lib.mkOption {
      type = lib.types.nullOr lib.types.str;
      default = null;
      example = "/run/secrets/vllm-proxy";
      description = "Variables for the daemon and its engines that are kept out of the store, such as HF_TOKEN.";
    };

    openFirewall = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = "Open the port of `settings.server.port`. Set `settings.server.host` too: it is on loopback.";
    };

    socketActivation = lib.mkOption {
      type = lib.types.bool;
      default = true;
      description = "Let systemd hold the listening socket, so that no client is refused while the daemon restarts.";
    };

    keepModels = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = ''
        Let engines outlive the daemon: the next one adopts them, after an upgrade too. Stopping the service leaves
        them running; `vllm-proxy stop --all --state-dir /var/lib/vllm-proxy` ends them.
      '';
    };

    user = lib.mkOption {
      type = lib.types.str;
      default = name;
      description = "The user of the service. It is made where it has this default name.";
    };

    group = lib.mkOption {
      type = lib.types.str;
      default = name;
      description = "The group of the service. It is made where it has this default name.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion =
          isGenerated
          || builtins.removeAttrs cfg.settings [ "server" ] == { }
          && builtins.removeAttrs server [ "host" "port" ] == { };
        message = "services.vllm-proxy: with configFile all is in that file: settings may hold server.host and port alone.";
      }
      {
        # Its folder becomes writable for the service.
        assertion = isGenerated || lib.hasPrefix "/" file && !lib.hasPrefix "${builtins.storeDir}/" file;
        message = "services.vllm-proxy: configFile must be an absolute path outside of the store, not ${file}.";
      }
      {
        assertion = !cfg.socketActivation || isAddress;
        message = "services.vllm-proxy: settings.server.host must be an address for socketActivation, not ${host}.";
      }
    ];

    environment.systemPackages = [ cfg.package ];
    environment.etc = lib.mkIf isGenerated { "${name}/models.toml".source = checked; };
    networking.firewall.allowedTCPPorts = lib.mkIf cfg.openFirewall [ port ];

    users.users = lib.mkIf (cfg.user == name) {
      ${name} = {
        isSystemUser = true;
        inherit (cfg) group;
        home = "/var/lib/${name}";
        # Who may use GPUs.
        extraGroups = [
          "render"
          "video"
        ];
      };
    };
    users.groups = lib.mkIf (cfg.group == name) { ${name} = { }; };

    systemd.sockets.${name} = lib.mkIf cfg.socketActivation {
      description = "vllm-proxy's address";
      wantedBy = [ "sockets.target" ];
      socketConfig = {
        ListenStream = if isIPv6 then "[${host}]:${toString port}" else "${host}:${toString port}";
        Backlog = 4096;
        NoDelay = true;
      };
    };

    systemd.services.${name} = {
      description = "vllm-proxy: many vLLM models behind one OpenAI-compatible address";
      wantedBy = [ "multi-user.target" ];
      wants = [
        "network-online.target"
        "modprobe@nvidia_uvm.service"
      ];
      after = [
        "network-online.target"
        "modprobe@nvidia_uvm.service"
        "nvidia-persistenced.service"
      ];
      # Not restartTriggers: models that did not change keep running.
      reloadTriggers = lib.optional isGenerated checked;
      environment = {
        VLLM_PROXY_CONFIG = file;
        HOME = "/var/lib/${name}";
        XDG_CACHE_HOME = "/var/cache/${name}";
        TRITON_HOME = "/var/cache/${name}";
      }
      # For the firewall and the socket they are known here alone.
      // lib.optionalAttrs (!isGenerated && server ? host) { VLLM_PROXY_HOST = host; }
      // lib.optionalAttrs (!isGenerated && server ? port) { VLLM_PROXY_PORT = toString port; }
      // lib.optionalAttrs cfg.keepModels { VLLM_PROXY_ON_EXIT = "keep"; };

      serviceConfig = {
        Type = "notify-reload";
        NotifyAccess = "main";
        ExecStart = "${lib.getExe cfg.package} serve";
        ExecReload = "${lib.getExe cfg.package} reload";
        Restart = "on-failure";
        RestartSec = 2;
        RestartPreventExitStatus = 78;
        TimeoutStartSec = 60;
        TimeoutStopSec = 120;
        WatchdogSec = 30;
        KillMode = if cfg.keepModels then "process" else "mixed";
        OOMPolicy = "continue";
        Delegate = "memory pids";
        DelegateSubgroup = "daemon";
        MemoryAccounting = true;

        User = cfg.user;
        Group = cfg.group;
        ConfigurationDirectory = name;
        StateDirectory = name;
        StateDirectoryMode = "0700";
        CacheDirectory = name;
        CacheDirectoryMode = "0750";
        RuntimeDirectory = name;
        RuntimeDirectoryMode = "0750";
        WorkingDirectory = "/var/lib/${name}";
        UMask = "0077";
        EnvironmentFile = lib.optional (cfg.environmentFile != null) cfg.environmentFile;
        SyslogIdentifier = name;
        LogRateLimitIntervalSec = 0;
        LimitNOFILE = 1048576;
        LimitMEMLOCK = "infinity";

        # Why what is open is open, the shipped unit says.
        NoNewPrivileges = true;
        CapabilityBoundingSet = "";
        AmbientCapabilities = "";
        ProtectSystem = "strict";
        ReadWritePaths = builtins.dirOf file;
        ProtectHome = true;
        PrivateTmp = !cfg.keepModels;
        RemoveIPC = !cfg.keepModels;
        PrivateDevices = false;
        DevicePolicy = "closed";
        DeviceAllow = [
          "char-nvidia* rw"
          "char-drm rw"
          "char-accel rw"
          "/dev/kfd rw"
          "/dev/dxg rw"
          "char-infiniband_verbs rw"
        ];
        MemoryDenyWriteExecute = false;
        ProtectControlGroups = false;
        PrivateNetwork = false;
        PrivateUsers = false;
        ProcSubset = "all";
        ProtectProc = "invisible";
        ProtectClock = true;
        ProtectHostname = true;
        ProtectKernelLogs = true;
        ProtectKernelModules = true;
        ProtectKernelTunables = true;
        LockPersonality = true;
        RestrictAddressFamilies = [
          "AF_INET"
          "AF_INET6"
          "AF_UNIX"
          "AF_NETLINK"
        ];
        RestrictNamespaces = true;
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        SystemCallArchitectures = "native";
        SystemCallFilter = [
          "@system-service"
          "~@privileged"
          "pidfd_getfd"
        ];
        SystemCallErrorNumber = "EPERM";
      }
      // lib.optionalAttrs cfg.keepModels { RuntimeDirectoryPreserve = true; };
    };
  };
}
