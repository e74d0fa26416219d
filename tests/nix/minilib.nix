# What packaging/nix uses of nixpkgs' lib, so that it can be evaluated where there is no nixpkgs. Priorities, submodules
# and options with more than one declaration are left out: a definition that needs them fails.
let
  inherit (builtins)
    all
    attrNames
    concatLists
    concatMap
    elem
    filter
    foldl'
    head
    isAttrs
    isBool
    isInt
    isList
    isString
    length
    listToAttrs
    map
    mapAttrs
    match
    ;

  is = tag: value: isAttrs value && value._type or null == tag;
  isPlain = value: isAttrs value && !(value ? _type) && !(value ? outPath);

  # The definitions in `value` whose conditions hold.
  live =
    value:
    if is "if" value then
      if value.condition then live value.content else [ ]
    else if is "override" value then
      live value.content
    else
      [ value ];

  # What `value` says about `name`. No condition is looked at: it may depend on the very option that is asked for.
  child =
    name: value:
    if is "if" value then
      map (lib.mkIf value.condition) (child name value.content)
    else if value ? ${name} then
      [ value.${name} ]
    else
      [ ];

  names = value: if is "if" value then names value.content else attrNames value;

  merge =
    path: values:
    if values == [ ] then
      throw "The option `${path}' was accessed but has no value defined."
    else if length values == 1 && !isPlain (head values) then
      head values
    else if all isList values then
      concatLists values
    else if all isPlain values then
      let
        keys = foldl' (found: value: found // mapAttrs (_: _: null) value) { } values;
        of = key: concatMap live (concatMap (child key) values);
      in
      listToAttrs (
        concatMap (
          key: if of key == [ ] then [ ] else [ { name = key; value = merge "${path}.${key}" (of key); } ]
        ) (attrNames keys)
      )
    else
      throw "The option `${path}' has conflicting definition values.";

  resolve =
    path: options: values:
    if is "option" options then
      let
        given = concatMap live values;
        value = if given == [ ] && options ? default then options.default else merge path given;
      in
      if options.type.check value then
        value
      else
        throw "A definition for option `${path}' is not of type `${options.type.name}'."
    else
      mapAttrs (
        name: option: resolve (if path == "" then name else "${path}.${name}") option (concatMap (child name) values)
      ) options;

  # True, or an error about the first definition that no option takes.
  known =
    path: options: value:
    is "option" options
    || all (
      name:
      if options ? ${name} then
        all (known "${path}${name}." options.${name}) (child name value)
      else
        throw "The option `${path}${name}' does not exist."
    ) (names value);

  type = name: check: {
    _type = "option-type";
    inherit name check;
  };

  lib = {
    types = {
      anything = type "anything" (_: true);
      bool = type "boolean" isBool;
      int = type "signed integer" isInt;
      str = type "string" isString;
      path = type "absolute path" (
        value: (isString value || builtins.isPath value) && builtins.substring 0 1 (toString value) == "/"
      );
      package = type "package" (value: isAttrs value && value ? outPath);
      nullOr = inner: type "null or ${inner.name}" (value: value == null || inner.check value);
      listOf = inner: type "list of ${inner.name}" (value: isList value && all inner.check value);
      attrsOf =
        inner: type "attribute set of ${inner.name}" (value: isAttrs value && all inner.check (map (name: value.${name}) (attrNames value)));
    };

    mkOption = option: { type = lib.types.anything; } // option // { _type = "option"; };
    mkEnableOption =
      what:
      lib.mkOption {
        type = lib.types.bool;
        default = false;
        description = what;
      };
    mkPackageOption =
      pkgs: name: _:
      lib.mkOption {
        type = lib.types.package;
        default = pkgs.${name};
      };
    mkIf = condition: content: {
      _type = "if";
      inherit condition content;
    };
    mkDefault = content: {
      _type = "override";
      inherit content;
    };

    concatMapStringsSep =
      between: f: list:
      builtins.concatStringsSep between (map f list);
    filterAttrs =
      f: set: listToAttrs (filter ({ name, value }: f name value) (lib.mapAttrsToList lib.nameValuePair set));
    genAttrs = keys: f: listToAttrs (map (name: { inherit name; value = f name; }) keys);
    getExe = package: "${package}/bin/${package.meta.mainProgram}";
    hasInfix = infix: text: match ".*${infix}.*" text != null;
    hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
    hasSuffix =
      suffix: text:
      let
        before = builtins.stringLength text - builtins.stringLength suffix;
      in
      before >= 0 && builtins.substring before (-1) text == suffix;
    head = builtins.head;
    importTOML = path: builtins.fromTOML (builtins.readFile path);
    licenses.asl20 = "Apache-2.0";
    makeLibraryPath = packages: builtins.concatStringsSep ":" (map (package: "${package}/lib") packages);
    mapAttrs' = f: set: listToAttrs (lib.mapAttrsToList f set);
    mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
    nameValuePair = name: value: { inherit name value; };
    optionalString = condition: text: if condition then text else "";
    removePrefix =
      prefix: text: if lib.hasPrefix prefix text then builtins.substring (builtins.stringLength prefix) (-1) text else text;
    toInt = builtins.fromJSON;
    toUpper = builtins.replaceStrings (lib.stringToCharacters "abcdefghijklmnopqrstuvwxyz") (
      lib.stringToCharacters "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    );
    stringToCharacters = text: builtins.genList (at: builtins.substring at 1 text) (builtins.stringLength text);
    unique = foldl' (found: value: if elem value found then found else found ++ [ value ]) [ ];
    optional = condition: value: if condition then [ value ] else [ ];
    optionalAttrs = condition: value: if condition then value else { };
    fileset = {
      unions = paths: paths;
      toSource =
        { root, fileset }:
        assert all builtins.pathExists fileset;
        toString root;
    };

    evalModules =
      { modules }:
      let
        loaded = concatMap load modules;
        load =
          module:
          let
            value = if builtins.isPath module then import module else module;
            found = if builtins.isFunction value then value arguments else value;
            own = if found ? options || found ? config then found.config or { } else removeAttrs found [ "imports" ];
          in
          [ { options = found.options or { }; config = own; } ] ++ concatMap load (found.imports or [ ]);
        removeAttrs = builtins.removeAttrs;
        extra = foldl' (found: module: found // (module.config._module.args or { })) { } (filter isAttrs modules);
        arguments = extra // { inherit lib config; };
        declared = foldl' (found: module: join found module.options) { } loaded;
        join =
          a: b: a // mapAttrs (name: value: if elem name (attrNames a) && !(is "option" value) then join a.${name} value else value) b;
        given = map (module: removeAttrs module.config [ "_module" ]) (filter (module: module.config != { }) loaded);
        config = resolve "" declared given;
      in
      {
        config = if all (known "" declared) given then config else null;
      };
  };
in
lib
