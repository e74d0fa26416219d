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

  isGenerated = cfg.configFile == null;
  file = if isGenerated then "/etc/${name}/models.toml" else cfg.configFile;
  server = cfg.settings.server or { };

  # Files that systemd reads for the service: by the key of [server] that names them, under which name, from where.
  files = {
    keys_file = {
      name = "keys.toml";
      source = cfg.keysFile;
    };
    tls_cert = {
      name = "tls.crt";
      source = cfg.tlsCert;
    };
    tls_key = {
      name = "tls.key";
      source = cfg.tlsKey;
    };
  };
  given = lib.filterAttrs (_: credential: credential.source != null) files;
  references = builtins.mapAttrs (_: credential: "credential:${credential.name}") given;
  credentials =
    cfg.credentials
    // builtins.listToAttrs (
      map (credential: {
        inherit (credential) name;
        value = credential.source;
      }) (builtins.attrValues given)
    );

  generated = format.generate "models.toml" (
    cfg.settings // lib.optionalAttrs (references != { }) { server = server // references; }
  );
  # An invalid file fails the build, with every problem and its place. What the service alone will have, a credential, is
  # not looked at; nor is a file that [server] names by its path, which is not there while the system is built.
  checked = pkgs.runCommand "models.toml" { } ''
    ${lib.concatMapStringsSep "\n" (key: "export VLLM_PROXY_${lib.toUpper key}=credential:${key}") (
      builtins.filter (key: server ? ${key}) (builtins.attrNames files)
    )}
    ${lib.getExe cfg.package} check --config ${generated}
    cp ${generated} $out
  '';

  host = server.host or "127.0.0.1";
  port = server.port or 8000;
  parsed =
    text:
    let
      found = builtins.match "(\\[([^]]+)]|([^:]+)):([0-9]+)" text;
      at = builtins.elemAt found;
    in
    if lib.hasPrefix "unix:" text then
      { path = lib.removePrefix "unix:" text; }
    else if found == null then
      throw "services.vllm-proxy: settings.server.listen takes HOST:PORT, [HOST]:PORT and unix:PATH, not ${text}"
    else
      {
        host = if at 1 == null then at 2 else at 1;
        port = lib.toInt (at 3);
      };
  addresses =
    if server.listen or [ ] == [ ] then [ { inherit host port; } ] else map parsed server.listen;
  ports = lib.unique (map (address: address.port) (builtins.filter (address: address ? port) addresses));
  paths = map (address: address.path) (builtins.filter (address: address ? path) addresses);

  isIPv6 = lib.hasInfix ":";
  isAddress = text: isIPv6 text || builtins.match "[0-9]+\\.[0-9]+\\.[0-9]+\\.[0-9]+" text != null;
  isLoopback =
    text:
    lib.hasPrefix "127." text
    || lib.hasSuffix ".localhost" text
    || builtins.elem text [
      "::1"
      "localhost"
      "ip6-localhost"
    ];
  shown =
    address:
    if address ? path then
      address.path
    else if isIPv6 address.host then
      "[${address.host}]:${toString address.port}"
    else
      "${address.host}:${toString address.port}";
  # Who can connect there need not be somebody of this machine.
  elsewhere = builtins.filter (address: address ? path || !isLoopback address.host) addresses;
  # What a file outside of the store says is not known here.
  isClosed =
    isGenerated
    && cfg.settings.keys or { } == { }
    && cfg.keysFile == null
    && !(server ? keys_file)
    && !(server.allow_remote_admin or false);
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
      description = ''
        Variables for the daemon and its engines that are kept out of the store, such as HF_TOKEN. For a secret of one
        model, or one that its engine alone should have: `credentials`.
      '';
    };

    keysFile = lib.mkOption {
      type = lib.types.nullOr lib.types.path;
      default = null;
      example = "/run/secrets/vllm-proxy-keys.toml";
      description = ''
        A file outside of the store with the tables `[keys.NAME]`, for `server.keys_file`. Root alone need be able to
        read it: systemd does (`LoadCredential=`), once, when the service starts. So a change of it, such as a revoked
        key, is in force after a restart. Where it must be at once: `settings.server.keys_file` with the path of a file
        that the service may read, such as `/var/lib/vllm-proxy/keys.toml`.
      '';
    };

    tlsCert = lib.mkOption {
      type = lib.types.nullOr lib.types.path;
      default = null;
      example = "/var/lib/acme/ai.example.org/fullchain.pem";
      description = ''
        The certificate for HTTPS (PEM), outside of the store; `tlsKey` goes with it. As with `keysFile` systemd reads
        both when the service starts. Where a renewed one must be served without a restart: `settings.server.tls_cert`
        and `tls_key`, with paths that the service may read.
      '';
    };

    tlsKey = lib.mkOption {
      type = lib.types.nullOr lib.types.path;
      default = null;
      example = "/var/lib/acme/ai.example.org/key.pem";
      description = "The private key of `tlsCert` (PEM), outside of the store.";
    };

    credentials = lib.mkOption {
      type = lib.types.attrsOf lib.types.path;
      default = { };
      example = {
        hf-token = "/run/secrets/hf-token";
      };
      description = ''
        Files outside of the store, by names that `settings` may use: `env.HF_TOKEN.credential = "hf-token"` in a
        model, `file = "credential:ci-key"` in a key. systemd reads them when the service starts.
      '';
    };

    openFirewall = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = ''
        Open the port of `settings.server.port`, or those of `settings.server.listen`. Set one of them or
        `settings.server.host` too: without, it is on loopback. Who has no key is answered 401 there.
      '';
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
        assertion =
          !cfg.socketActivation || builtins.all (address: address ? path || isAddress address.host) addresses;
        message = "services.vllm-proxy: settings.server.host must be an address for socketActivation, not ${host}; so must those of settings.server.listen.";
      }
      {
        assertion = (cfg.tlsCert == null) == (cfg.tlsKey == null);
        message = "services.vllm-proxy: tlsCert and tlsKey go together: give both or none.";
      }
      {
        assertion = builtins.intersectAttrs references server == { };
        message = "services.vllm-proxy: what keysFile, tlsCert and tlsKey give must not stand in settings.server too.";
      }
      {
        assertion = !builtins.any (credential: cfg.credentials ? ${credential}) [
          "keys.toml"
          "tls.crt"
          "tls.key"
        ];
        message = "services.vllm-proxy: keys.toml, tls.crt and tls.key in credentials are those of keysFile, tlsCert and tlsKey.";
      }
      {
        # Everybody may read what is in the store.
        assertion = builtins.all (source: !lib.hasPrefix "${builtins.storeDir}/" (toString source)) (
          builtins.attrValues credentials
        );
        message = "services.vllm-proxy: keysFile, tlsCert, tlsKey and credentials must be outside of the store: give their paths as text.";
      }
    ];

    warnings = lib.optional (isClosed && elsewhere != [ ]) (
      "services.vllm-proxy: ${lib.concatMapStringsSep ", " shown elsewhere} is not loopback, and there are no keys: "
      + "every request there but for /health and /ready will be answered 401"
      + lib.optionalString (cfg.environmentFile != null) ", unless environmentFile has VLLM_PROXY_API_KEY"
      + ". Either configure keys (settings.keys or keysFile; `vllm-proxy keys new NAME` makes one), or let whoever can "
      + "connect use the models: settings.keys.anonymous.scopes = [ \"inference\" ]."
    );

    environment.systemPackages = [ cfg.package ];
    environment.etc = lib.mkIf isGenerated { "${name}/models.toml".source = checked; };
    networking.firewall.allowedTCPPorts = lib.mkIf cfg.openFirewall ports;

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
        ListenStream = map shown addresses;
        Backlog = 4096;
        NoDelay = true;
      }
      // lib.optionalAttrs (paths != [ ]) {
        SocketUser = cfg.user;
        SocketGroup = cfg.group;
        SocketMode = "0660";
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
      # Beside a file outside of the store.
      // lib.optionalAttrs (!isGenerated) (
        lib.mapAttrs' (key: lib.nameValuePair "VLLM_PROXY_${lib.toUpper key}") references
      )
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
        LoadCredential = lib.mapAttrsToList (credential: source: "${credential}:${toString source}") credentials;
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
      # A socket of systemd's may lie there too.
      // lib.optionalAttrs (cfg.keepModels || cfg.socketActivation && paths != [ ]) {
        RuntimeDirectoryPreserve = true;
      };
    };
  };
}
