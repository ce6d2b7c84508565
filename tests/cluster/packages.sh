# Sourced: `need PACKAGE...` installs the Debian packages that are missing; says why it cannot.
need() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return
  command -v apt-get >/dev/null || { echo "missing: ${missing[*]}. This script installs with apt-get (Debian), which is not here." >&2; exit 1; }
  [ "$(id -u)" = 0 ] || { echo "missing: ${missing[*]}. Installing them needs root." >&2; exit 1; }
  echo "installing ${missing[*]}"
  [ -n "$(find /var/lib/apt/lists -name '*Packages*' -mtime -1 2>/dev/null | head -1)" ] || apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# `stop_all FOLDER NAME...` ends the processes whose pid files lie in FOLDER, if they still are programs of that NAME.
stop_all() {
  local folder=$1 file pid
  shift
  for file in $(find "$folder" -maxdepth 2 -name '*.pid' 2>/dev/null); do
    pid=$(cat "$file" 2>/dev/null) || continue
    [ -n "$pid" ] && grep -qxE "$(IFS='|'; echo "$*")" "/proc/$pid/comm" 2>/dev/null || continue
    kill "$pid"
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
  done
}
