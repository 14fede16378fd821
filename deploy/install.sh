#!/bin/sh
# Installs Sketchfleet's agent, or with --role coordinator its coordinator, as a service of systemd.
#
# Each version is a virtual environment of its own, and `current` points at the one that runs:
#   /opt/sketchfleet/ROLE/versions/VERSION-DIGEST, /opt/sketchfleet/ROLE/current
#   /usr/local/bin/sketchfleet-ROLE                  links to it
#   /etc/sketchfleet/agent.toml or run.toml          settings; one that is there is left alone
#   /var/lib/sketchfleet/ROLE, .../ROLE.made         state; what this installer made, for --uninstall
#   /var/cache/sketchfleet/ROLE                      base models that were fetched
# Running it again upgrades, or finds nothing to do; a version that does not start is taken back.
# Everything is in functions and `main` is called on the last line: half a file does nothing.
set -eu

usage() {
  cat <<'END'
Usage: install.sh [OPTION]... [SOURCE]

SOURCE is a bundle (folder or .tar), a folder of wheels (nothing else is fetched then) or Sketchfleet's
wheel (what it needs comes from pip's index). Default: the bundle that this script lies in, else the index.

  --role agent|coordinator   what to install (default: agent)
  --extras LIST              of the package, as in agent,serve (default: as the bundle says, else the role)
  --constraints FILE         pins for pip (default: the bundle's)
  --python FILE              interpreter, 3.10 to 3.13 (default: the bundle's version, else the newest)
  --version VERSION          from the index (default: the newest)
  --sha256 HEX               what the wheel, the .tar or the bundle's SHA256SUMS must hash to
  --config FILE              settings to begin with, where none are there yet
  --join FILE                enrol with this join file (agent); it is never passed as an argument
  --root DIR                 install below DIR and run from there: no user, no service
  --no-service               no unit and no user; start it yourself
  --system-site-packages     let the environment see the system's Python packages
  --uninstall                take it away; settings, keys and state stay
  --purge                    with --uninstall: those too
  --dry-run                  say what would be done and do nothing
END
}

say() { printf '%s\n' "$*"; }
fail() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

# Does it, or with --dry-run says so.
run() {
  if [ -n "$dry" ]; then say "would run: $*"; else "$@"; fi
}

# --- what this machine is --------------------------------------------------------------------------

# The L4T release that a line like "# R36 (release), REVISION: 4.7, ..." names, as in 36.4.7.
l4t_of() { sed -n 's/^# R\([0-9]*\) (release), REVISION: \([0-9.]*\).*/\1.\2/p' "$1" 2>/dev/null | head -n 1; }

check_machine() {
  if with_service && ! { has systemctl && has runuser; }; then
    fail "there is no systemd here; pass --no-service and start it yourself"
  fi
  [ "$(uname -s)" = Linux ] || fail "Sketchfleet runs on Linux; this is $(uname -s)"
  machine=$(uname -m)
  case $machine in
    x86_64 | aarch64) ;;
    *) fail "there are no packages for $machine; Sketchfleet needs x86_64 or aarch64 (64 bits)" ;;
  esac
  libc=$(getconf GNU_LIBC_VERSION 2>/dev/null | sed 's/^glibc //') || libc=
  [ -n "$libc" ] || fail "needs glibc, which $machine packages are built for; Alpine and other musl systems can run the container"
  at_least "$libc" 2.28 || fail "glibc $libc is too old for the packages, which need 2.28; upgrade the system (Jetson: JetPack 6 or later)"
  l4t=$(l4t_of /etc/nv_tegra_release)
  case ${l4t%%.*} in
    '') ;;
    36) say "Jetson, L4T $l4t (JetPack 6: Python 3.10)" ;;
    3[89] | [4-9][0-9]) say "Jetson, L4T $l4t (JetPack 7: Python 3.12)" ;;
    *) fail "L4T $l4t is older than JetPack 6, whose Python this needs; flash a newer JetPack" ;;
  esac
}

# Whether version $1 is at least $2.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# Whether $1 is a Python that can be used; what is wrong with it goes to $why.
usable_python() {
  why="$1 does not run"
  found=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
  why="$1 is Python $found; 3.10 to 3.13 is needed"
  case $found in 3.1[0-3]) ;; *) return 1 ;; esac
  # What the service's own user has to run may not lie in somebody's home.
  why="$1 lies in a private folder, which the service cannot read; install a Python for everybody (apt install python$found-venv)"
  if with_service; then
    case $("$1" -c 'import sys; print(sys.base_prefix)') in "/root"/* | /home/*) return 1 ;; esac
  fi
  why="$1 cannot make virtual environments; install its venv module (Debian, Ubuntu, Jetson: apt install python$found-venv)"
  "$1" -c 'import ensurepip, venv' 2>/dev/null || return 1
  python=$1 python_version=$found
}

# Chooses $python: the one asked for, the bundle's version, else JetPack's own or the newest.
find_python() {
  if [ -n "$python" ]; then
    has "$python" || fail "--python $python is not there"
    usable_python "$python" || fail "$why"
    [ -z "$wanted_python" ] || [ "$python_version" = "$wanted_python" ] ||
      fail "the wheels are for Python $wanted_python, $python is $python_version; leave --python out or make a bundle for it"
    return 0
  fi
  candidates="python3.13 python3.12 python3.11 python3.10 python3"
  [ -z "$l4t" ] || candidates="/usr/bin/python3 $candidates"
  [ -z "$wanted_python" ] || candidates="python$wanted_python python3"
  reasons=
  for candidate in $candidates; do
    if has "$candidate"; then
      if usable_python "$candidate" && { [ -z "$wanted_python" ] || [ "$found" = "$wanted_python" ]; }; then
        python=$(command -v "$candidate")
        return 0
      fi
      reasons="$reasons; $why"
    fi
  done
  python=
  [ -z "$wanted_python" ] || fail "the wheels are for Python $wanted_python, which is not here; install it (apt install python$wanted_python-venv) or make a bundle for another$reasons"
  fail "no usable Python from 3.10 to 3.13 on the PATH; install one (apt install python3-venv) or pass --python${reasons}"
}

# Megabytes needed for $extras, and whether they are free.
check_room() {
  case ,$extras, in
    *,train,* | *,trial,*) need_mb=8000 ;;
    *) need_mb=500 ;;
  esac
  [ -z "$wheels" ] || need_mb=$((4 * $(du -sm "$wheels" | cut -f 1) + 100))
  place=$root/opt/sketchfleet
  while [ ! -e "$place" ]; do place=$(dirname "$place"); done
  [ -d "$place" ] || fail "$place is no folder; choose another --root"
  free_mb=$(df -Pm "$place" | awk 'NR == 2 { print $4 }')
  [ "$free_mb" -ge "$need_mb" ] || fail "$place has $free_mb MB free, installing needs $need_mb MB; make room there"
  [ -w "$place" ] || fail "$place cannot be written; run this as root, or pass --root DIR"
  inside=$place/.sketchfleet-install.$$
  [ -n "$dry" ] || { mkdir "$inside" 2>/dev/null && rmdir "$inside"; } || fail "$place cannot be written (read-only?); choose another --root or mount it for writing"
}

# --- where it comes from ---------------------------------------------------------------------------

# Sets $wheel (Sketchfleet's own), $wheels (folder; nothing else is fetched), $bundle.
find_source() {
  here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
  bundle='' wheels='' wheel='' model=''
  if [ -z "$source" ] && [ -f "$here/manifest.json" ] && [ -d "$here/wheels" ]; then source=$here; fi
  case $source in
    '') [ -z "$sha256" ] || fail "--sha256 needs a SOURCE that lies here" ;;
    *.tar)
      [ -f "$source" ] || fail "$source is not there"
      check_digest "$source"
      sha256=
      scratch
      tar -xf "$source" -C "$scratch" || fail "$source cannot be unpacked; copy it again, whole"
      set -- "$scratch"/*/manifest.json
      [ -f "$1" ] || fail "$source is no bundle of sketchfleet-agent bundle: it holds no manifest.json"
      bundle=$(dirname "$1")
      ;;
    *.whl)
      [ -f "$source" ] || fail "$source is not there"
      check_digest "$source"
      wheel=$source
      ;;
    *)
      [ -d "$source" ] || fail "$source is no wheel, no .tar and no folder"
      if [ -f "$source/manifest.json" ]; then bundle=$source; else wheels=$source; fi
      ;;
  esac
  [ -z "$bundle" ] || open_bundle
  if [ -n "$wheels" ]; then
    [ -n "$bundle" ] || [ ! -f "$wheels/SHA256SUMS" ] || check_sums "$wheels"
    set -- "$wheels"/sketchfleet-*.whl
    [ -f "$1" ] || fail "$wheels holds no sketchfleet-*.whl"
    [ $# -eq 1 ] || fail "$wheels holds several versions of Sketchfleet; leave one"
    wheel=$1
  fi
  [ -z "$wheel" ] || wheel=$(absolute "$wheel")
  [ -z "$wheels" ] || wheels=$(absolute "$wheels")
}

absolute() { case $1 in /*) say "$1" ;; *) say "$PWD/$1" ;; esac; }

scratch() {
  [ -n "$scratch" ] || scratch=$(mktemp -d "${TMPDIR:-/tmp}/sketchfleet-install.XXXXXX")
}

# Whether $1 hashes to --sha256, if that was given.
check_digest() {
  [ -n "$sha256" ] || return 0
  [ "$(sha256sum "$1" | cut -d ' ' -f 1)" = "$sha256" ] ||
    fail "$1 is not what --sha256 says; it was damaged or changed on its way: fetch it again, and do not install it"
}

# Verifies every file of folder $1 against its SHA256SUMS; a file that is not listed is a fault too.
check_sums() {
  check_digest "$1/SHA256SUMS"
  (cd "$1" && sha256sum --quiet -c SHA256SUMS) >&2 ||
    fail "$1 does not hold what its SHA256SUMS lists; it was damaged or changed on its way: fetch it again, and do not install it"
  (cd "$1" && find . ! -type d ! -name SHA256SUMS) | while read -r file; do
    awk -v name="${file#./}" '{ sub(/^[0-9a-f]+ [ *]/, "") } $0 == name { found = 1 } END { exit !found }' "$1/SHA256SUMS" ||
      fail "$1 holds ${file#./}, which its SHA256SUMS does not list: fetch it again, and do not install it"
  done || exit 1
}

open_bundle() {
  check_sums "$bundle"
  wheels=$bundle/wheels
  [ "$(cat "$bundle/MACHINE")" = "$machine" ] || fail "the bundle is for $(cat "$bundle/MACHINE"), this machine is $machine; make one for it"
  case $role,$(cat "$bundle/EXTRAS"), in
    agent,coordinator,) fail "the bundle is a coordinator's; pass --role coordinator" ;;
    agent,* | coordinator,*coordinator,*) ;;
    *) fail "the bundle has nothing for a coordinator; make one with --extras coordinator" ;;
  esac
  wanted_python=$(cat "$bundle/PYTHON")
  [ -n "$extras" ] || extras=$(cat "$bundle/EXTRAS")
  [ -n "$constraints" ] || [ ! -f "$bundle/constraints.txt" ] || constraints=$bundle/constraints.txt
  [ -n "$config" ] || [ ! -f "$bundle/agent.toml" ] || config=$bundle/agent.toml
  [ -n "$join" ] || [ ! -f "$bundle/join" ] || join=$bundle/join
  [ ! -d "$bundle/model" ] || model=$bundle/model
}

# From the index: Sketchfleet's own wheel first, so that its version is known.
fetch_wheel() {
  scratch
  "$python" -m venv "$scratch/fetch"
  "$scratch/fetch/bin/python" -m pip download --quiet --disable-pip-version-check --no-input --no-deps \
    --only-binary :all: -d "$scratch" "sketchfleet${version:+==$version}" ||
    fail "pip could not fetch sketchfleet${version:+ $version}; check the network and pip's index, or bring a bundle (sketchfleet-agent bundle)"
  set -- "$scratch"/sketchfleet-*.whl
  wheel=$1
}

# --- making and taking away ------------------------------------------------------------------------

# Makes folder $1 (mode $2) with its parents, and notes what was not there before.
make_folder() {
  [ ! -d "$1" ] || return 0
  make_folder "$(dirname "$1")" 755
  run mkdir -m "$2" "$1"
  [ -n "$dry" ] || note "$1"
}

# What this installer made, so that exactly that is taken away. Held back until its folder is there.
note() {
  notes="$notes$1
"
  [ ! -d "$(dirname "$made")" ] || { printf '%s' "$notes" >>"$made"; notes=; }
}

made_here() { [ -f "$made" ] && grep -qxF -- "$1" "$made"; }

# Puts a file's text (standard input) at $1 in one step, mode $2.
put() {
  if [ -n "$dry" ]; then say "would write: $1"; cat >/dev/null; return 0; fi
  cat >"$1.new"
  chmod "$2" "$1.new"
  mv -f "$1.new" "$1"
}

# Points link $2 at $1 in one step.
point() {
  run ln -sfn "$1" "$2.new"
  run mv -fT "$2.new" "$2"
}

# Makes a folder that is the service's alone.
make_own_folder() {
  make_folder "$1" 700
  if with_service; then run chown "$user:" "$1"; fi
}

with_service() { [ -z "$root" ] && [ -z "$no_service" ]; }

# Runs the program as who will run it.
as_owner() {
  if with_service; then (cd / && runuser -u "$user" -- "$@"); else "$@"; fi
}

make_user() {
  with_service || return 0
  if ! id "$user" >/dev/null 2>&1; then
    has useradd || fail "there is no useradd to make the user $user; make it yourself, or pass --no-service"
    run useradd --system --user-group --no-create-home --home-dir "$state" --shell /usr/sbin/nologin "$user"
    [ -n "$dry" ] || note "user $user"
  fi
  [ "$role" = agent ] || return 0
  for group in video render; do # those of the GPU's devices; old JetPacks lack the second
    if getent group "$group" >/dev/null; then run usermod -aG "$group" "$user"; fi
  done
}

settings_to_begin_with() {
  if [ -n "$config" ]; then
    cat "$config"
    if [ -n "$model" ] && ! grep -q '^\[model\]' "$config"; then printf '\n[model]\nbase = "%s"\n' "$state/model"; fi
  elif [ "$role" = agent ]; then
    printf '# What the owner of this device decides about it.\n'
    printf '# All keys: sketchfleet-agent config --effective\n\n'
    printf '[data]\n# Folders of code to train on. It never leaves this machine.\ninclude = []\n'
    if [ -n "$model" ]; then printf '\n[model]\nbase = "%s"\n' "$state/model"; fi
  else
    printf '# The run that this coordinator serves.\n\n'
    printf '[run]\n# name = "first"\n\n[model]\n# base = "hub id or folder"\n'
  fi
}

put_settings() {
  make_folder "$(dirname "$settings")" 755
  if [ -f "$settings" ]; then
    say "$settings is kept as it is"
  else
    settings_to_begin_with | put "$settings" 644
    [ -n "$dry" ] || note "$settings"
  fi
  if [ -n "$model" ] && ! cmp -s "$bundle/manifest.json" "$state/model/.manifest"; then
    say "copies the base model"
    run rm -rf "$state/model.new"
    run cp -R "$model" "$state/model.new"
    run cp "$bundle/manifest.json" "$state/model.new/.manifest"
    if with_service; then run chown -R "$user:" "$state/model.new"; fi
    run rm -rf "$state/model"
    run mv "$state/model.new" "$state/model"
  fi
}

# Whether JetPack's own PyTorch is wanted: no index has one for its CUDA, and the source brings none.
wants_system_packages() {
  [ -z "$system_packages" ] || return 0
  [ -n "$l4t" ] || return 1
  case ,$extras, in *,train,*) ;; *) return 1 ;; esac
  [ -z "$wheels" ] || [ -z "$(find "$wheels" -name 'torch-*.whl')" ] || return 1
  "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'
}

build() {
  say "makes $target with Python $python_version"
  make_folder "$home/versions" 755
  if [ -z "$dry" ] && has flock; then
    exec 9<"$home"
    flock -n 9 || fail "another install.sh is at work on $home; wait for it"
  fi
  see=
  if wants_system_packages; then
    whose=''
    [ -n "$system_packages" ] || whose=", for JetPack's own PyTorch"
    say "the environment sees the system's Python packages$whose (--system-site-packages)"
    see=--system-site-packages
  fi
  building=$target
  run rm -rf "$target" # of an attempt that was cut short
  # shellcheck disable=SC2086 # $see is one option or none
  run "$python" -m venv $see "$target"
  set -- --quiet --disable-pip-version-check --no-input --only-binary :all:
  [ -z "$wheels" ] || set -- "$@" --no-index --find-links "$wheels"
  [ -z "$constraints" ] || set -- "$@" --constraint "$constraints"
  run "$target/bin/python" -m pip install "$@" "$wheel${extras:+[$extras]}" ||
    fail "pip could not install it (its reason stands above); nothing was changed"
  run "$target/bin/$program" --help >/dev/null || fail "the new version does not start; nothing was changed"
  [ -n "$dry" ] || printf '%s\n' "$extras" >"$target/.installed"
  building=
}

# Whether what `current` points at is in order: it starts, and its settings, if they were in order
# before, still are.
healthy() {
  as_owner "$home/current/bin/$program" --help >/dev/null || return 1
  [ -z "$settings_were_right" ] || as_owner "$home/current/bin/$program" config --config "$settings" >/dev/null
}

settings_right() {
  [ -x "$home/current/bin/$program" ] && [ -f "$settings" ] &&
    as_owner "$home/current/bin/$program" config --config "$settings" >/dev/null 2>&1
}

# Points `current` at the new version; one that does not come up gives way to the one before.
switch() {
  settings_were_right=
  if settings_right; then settings_were_right=yes; fi
  before=$(readlink "$home/current" || true)
  point "versions/$name" "$home/current"
  put_links
  put_units
  [ -z "$dry" ] || return 0
  if healthy && restarted; then return 0; fi
  if [ -z "$before" ] || [ "$before" = "versions/$name" ]; then
    fail "$program does not come up; its own words stand above"
  fi
  point "$before" "$home/current"
  put_units
  restarted || true
  rm -rf "$target"
  fail "the new version does not come up, ${before#versions/} runs again; its own words stand above"
}

put_links() {
  make_folder "$root/usr/local/bin" 755
  point "$home/current/bin/$program" "$root/usr/local/bin/$program"
}

# The units, as the version that `current` points at has them.
put_units() {
  with_service || return 0
  if [ -n "$dry" ]; then say "would write and enable: /etc/systemd/system/$unit"; return 0; fi
  units=$(echo "$home"/current/lib/python3*/site-packages/edge_agent/shipped/deploy/systemd)
  [ -d "$units" ] || units=$here/systemd
  [ -d "$units" ] || fail "the systemd units are neither in the package nor beside this script; pass --no-service"
  make_folder /etc/systemd/system 755
  cmp -s "$units/$unit" "/etc/systemd/system/$unit" || changed=yes
  put "/etc/systemd/system/$unit" 644 <"$units/$unit"
  systemd=$(systemctl --version 2>/dev/null | awk 'NR == 1 { print $2 }')
  if at_least "${systemd:-0}" 254; then
    make_folder "/etc/systemd/system/$unit.d" 755
    put "/etc/systemd/system/$unit.d/backoff.conf" 644 <"$units/backoff.conf"
  fi
  # In a container or another root no systemd runs that could be told.
  [ ! -d /run/systemd/system ] || run systemctl daemon-reload
  run systemctl --quiet enable "$unit"
}

# Restarts the service if it ran before, or starts it where it can work. `systemctl` waits for READY.
restarted() {
  with_service && [ -d /run/systemd/system ] || return 0
  if systemctl --quiet is-active "$unit"; then
    systemctl restart "$unit"
  elif ready_to_run; then
    systemctl start "$unit"
  fi
}

ready_to_run() {
  settings_right || return 1
  [ "$role" = coordinator ] || has_joined || grep -q '^plain_text *= *true' "$settings"
}

# All versions but the running one and the one before it.
tidy() {
  for old in "$home"/versions/*; do
    case versions/${old##*/} in
      "versions/$name" | "${before:-versions/$name}") ;;
      *) [ ! -d "$old" ] || run rm -rf "$old" ;;
    esac
  done
}

has_joined() { [ -f "$state/identity/pair.json" ]; }

enrol() {
  [ -n "$join" ] || return 0
  if has_joined; then
    say "this device has joined a fleet already; the join file is not used"
    return 0
  fi
  if [ -n "$dry" ]; then say "would enrol with $join"; return 0; fi
  as_owner "$home/current/bin/$program" enroll - --config "$settings" --patience 0.2 <"$join" ||
    fail "installed, but not enrolled (the reason stands above); run this again with --join when that is mended"
  if with_service && [ -d /run/systemd/system ]; then systemctl start "$unit"; fi
  say "enrolled; delete $join"
}

next_steps() {
  say ''
  if [ -n "$dry" ]; then say "nothing was done (--dry-run)"; return 0; fi
  say "$program $name is installed: $root/usr/local/bin/$program"
  as=
  if with_service; then as="runuser -u $user -- "; fi
  if [ "$role" = agent ]; then
    [ -n "$settings_were_right" ] || say "  next: name the code to train on in $settings, [data] include"
    has_joined || say "  then: ${as}$program enroll - < JOINFILE      (or run this again with --join JOINFILE)"
  else
    [ -n "$settings_were_right" ] || say "  next: describe the run in $settings, then ${as}$program init"
  fi
  if with_service; then
    say "  start: systemctl start $unit      watch: journalctl -fu $unit"
  else
    say "  start: $root/usr/local/bin/$program $verb"
  fi
}

# Whether the version that is wanted is there, whole, and starts.
works() { [ -f "$target/.installed" ] && "$target/bin/$program" --help >/dev/null 2>&1; }

install() {
  check_machine
  find_source
  [ -n "$extras" ] || extras=$role
  find_python
  check_room
  if [ -z "$wheel" ]; then
    if [ -n "$dry" ]; then say "would fetch sketchfleet${version:+ $version} from pip's index"; wheel=sketchfleet-newest-; else fetch_wheel; fi
  fi
  # What an environment is made of names it: the same again is nothing to do.
  name=${wheel##*/sketchfleet-}
  digest=$({
    [ ! -f "$wheel" ] || cat "$wheel"
    ls "${wheels:-/dev/null}"
    cat "${constraints:-/dev/null}"
    say "$extras $python_version $system_packages"
  } | sha256sum | cut -c 1-8)
  name=${name%%-*}-$digest
  target=$home/versions/$name
  fresh=yes changed='' before="versions/$name" settings_were_right=''
  [ "$(readlink "$home/current" || true)" != "$before" ] || ! works || fresh=
  works || build
  make_folder "$(dirname "$made")" 755
  make_user
  make_own_folder "$state"
  make_own_folder "$cache"
  put_settings
  if [ -n "$fresh" ]; then
    switch
    tidy
  else
    put_links
    put_units
    if settings_right; then settings_were_right=yes; fi
    if [ -n "$changed" ]; then restarted; fi
  fi
  enrol
  if [ -z "$fresh" ] && [ -z "$changed" ]; then say "$program $name is installed already: nothing to do"; else next_steps; fi
}

uninstall() {
  if [ -z "$purge" ] && [ -d "$state" ] && [ -t 0 ] && [ -z "$dry" ]; then
    printf 'Delete the keys and state in %s too? They cannot be had back. [y/N] ' "$state"
    read -r answer || answer=
    case $answer in [yY]*) purge=yes ;; esac
  fi
  if [ -f "/etc/systemd/system/$unit" ] && with_service; then
    if [ -d /run/systemd/system ]; then run systemctl --quiet disable --now "$unit"; else run systemctl --quiet disable "$unit"; fi
    run rm -rf "/etc/systemd/system/$unit" "/etc/systemd/system/$unit.d"
    [ ! -d /run/systemd/system ] || run systemctl daemon-reload
  fi
  link=$root/usr/local/bin/$program
  case $(readlink "$link" || true) in "$home"/*) run rm -f "$link" "$link.new" ;; esac
  run rm -rf "$home"
  if [ -n "$purge" ]; then
    notes=
    [ ! -f "$made" ] || notes=$(cat "$made")
    run rm -rf "$state" "$cache" "$made"
    if printf '%s\n' "$notes" | grep -qxF "user $user"; then run userdel "$user"; fi
    if printf '%s\n' "$notes" | grep -qxF -- "$settings"; then run rm -f "$settings"; fi
    [ ! -f "$settings" ] || [ -n "$dry" ] || say "$settings was there before and is kept"
  else
    notes=$(cat "$made" 2>/dev/null || true)
    [ ! -d "$state" ] || say "kept: $settings, $state (keys and state); --uninstall --purge deletes them"
  fi
  # Folders that are empty now: Sketchfleet's, and others that were not there, the innermost first.
  notes=$(printf '%s\n' "$notes" "$root/opt/sketchfleet" "$root/etc/sketchfleet" "$root/var/lib/sketchfleet" "$root/var/cache/sketchfleet")
  printf '%s\n' "$notes" | sort -ru | while read -r folder; do
    case $folder in /*) if [ -n "$dry" ]; then say "would remove if empty: $folder"; else rmdir "$folder" 2>/dev/null || true; fi ;; esac
  done
  if [ -n "$dry" ]; then say "nothing was done (--dry-run)"; else say "$program is uninstalled"; fi
}

leave() {
  status=$?
  [ -z "$building" ] || [ -n "$dry" ] || rm -rf "$building"
  [ -z "$notes" ] || [ -n "$uninstall" ] || printf '%s' "$notes" | sort -r | while read -r folder; do rmdir "$folder" 2>/dev/null || true; done
  [ -z "$scratch" ] || rm -rf "$scratch"
  exit "$status"
}

main() {
  role=agent extras='' constraints='' python='' version='' sha256='' config='' join='' root='' source=''
  no_service='' system_packages='' uninstall='' purge='' dry='' scratch='' building='' notes='' wanted_python=''
  while [ $# -gt 0 ]; do
    case $1 in
      --role | --extras | --constraints | --python | --version | --sha256 | --config | --join | --root)
        [ $# -ge 2 ] || fail "$1 needs a value; see --help"
        case $1 in
          --role) role=$2 ;; --extras) extras=$2 ;; --constraints) constraints=$2 ;; --python) python=$2 ;;
          --version) version=$2 ;; --sha256) sha256=$2 ;; --config) config=$2 ;; --join) join=$2 ;; --root) root=$2 ;;
        esac
        shift 2 ;;
      --no-service) no_service=yes; shift ;;
      --system-site-packages) system_packages=yes; shift ;;
      --uninstall) uninstall=yes; shift ;;
      --purge) purge=yes; shift ;;
      --dry-run) dry=yes; shift ;;
      --help | -h) usage; exit 0 ;;
      -*) fail "unknown option $1; see --help" ;;
      *) [ -z "$source" ] || fail "one SOURCE only; see --help"; source=$1; shift ;;
    esac
  done
  case $role in
    agent) file=agent.toml verb=run ;;
    coordinator) file=run.toml verb=serve ;;
    *) fail "--role is agent or coordinator, not $role" ;;
  esac
  case $extras in *[!a-z,]*) fail "--extras is a list like agent,serve, not $extras" ;; esac
  [ -z "$purge" ] || [ -n "$uninstall" ] || fail "--purge goes with --uninstall"
  [ -z "$join" ] || [ "$role" = agent ] || fail "--join is for the agent"
  for given in "$constraints" "$config" "$join"; do
    [ -z "$given" ] || [ -f "$given" ] || fail "$given is not there"
  done
  case $root in '' | /*) ;; *) root=$PWD/$root ;; esac
  root=${root%/}
  [ -n "$root" ] || [ "$(id -u)" = 0 ] || [ -n "$dry" ] || fail "run this as root (sudo), or pass --root DIR to install for yourself"
  program=sketchfleet-$role user=sketchfleet-$role unit=sketchfleet-$role.service
  home=$root/opt/sketchfleet/$role state=$root/var/lib/sketchfleet/$role cache=$root/var/cache/sketchfleet/$role
  made=$root/var/lib/sketchfleet/$role.made settings=$root/etc/sketchfleet/$file
  umask 022
  trap leave EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  if [ -n "$uninstall" ]; then uninstall; else install; fi
}

main "$@"
