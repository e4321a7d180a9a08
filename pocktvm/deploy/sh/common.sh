# What every script on the device starts with. POSIX sh and coreutils only. Values come as quoted
# assignments in front: folder token client takeover.
#
# The folder on the device:
#   current -> versions/X     what is deployed; replaced by one rename
#   versions/X/               an artifact; X.sha256 its hashes, X.previous what it replaced
#   previous -> versions/Y    for people to see; X.previous is what counts
#   data/HASH.safetensors, checkpoint.safetensors
#   lock -> 'PID START BOOT CLIENT SINCE'    a link, since making one is atomic and it carries text
#   incoming.TOKEN/           of a deployment under way; whoever gets the lock removes old ones
LC_ALL=C
export LC_ALL
umask 022

say() { printf 'pocktvm:%s\n' "$*"; }

fail() { # KIND DETAIL...
  kind=$1
  shift
  say "fail $kind $(printf '%s' "$*" | tr '\n' ' ' | cut -c 1-2000)"
  exit 10
}

find_place() {
  case $folder in
    /*) ;;
    '~' | '~/'*) folder=$HOME${folder#?} ;;
    *) folder=$HOME/$folder ;;
  esac
  say "fact folder $folder"
}

find_tools() { # sets $sha
  missing=
  for tool in tar mv ln readlink tr cut tail head cat grep mkdir rm sync date; do
    command -v "$tool" >/dev/null 2>&1 || missing="$missing $tool"
  done
  sha=
  if command -v sha256sum >/dev/null 2>&1; then sha=sha256sum; fi
  if [ -z "$sha" ] && command -v shasum >/dev/null 2>&1; then sha='shasum -a 256'; fi
  [ -n "$sha" ] || missing="$missing sha256sum"
}

# --- the lock ---

started() { # PID -> ticks since boot at its start, so that a reused number is told apart
  [ -r "/proc/$1/stat" ] || return 1
  line=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  set -- ${line##*) }
  [ "$1" != Z ] || return 1
  echo "${20}"
}

alive() { # PID START
  if [ "$2" = - ]; then kill -0 "$1" 2>/dev/null; else [ "$(started "$1")" = "$2" ]; fi
}

stop_holder() { # PID START: its whole process group, gently first: a trainer saves
  kill -TERM "-$1" 2>/dev/null || kill -TERM "$1" 2>/dev/null
  for second in 1 2 3 4 5 6 7 8 9 10; do
    alive "$1" "$2" || return 0
    sleep 1
  done
  kill -KILL "-$1" 2>/dev/null || kill -KILL "$1" 2>/dev/null
  sleep 1
}

break_lock() { # HOLDER: only if it still is that one
  mv -f lock "lock.$$" 2>/dev/null || return 0
  found=$(readlink "lock.$$")
  [ "$found" = "$1" ] || ln -s "$found" lock 2>/dev/null
  rm -f "lock.$$"
}

take_lock() {
  boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo -)
  me="$$ $(started $$ || echo -) $boot $client $(date +%s)"
  tries=0
  until errors=$(ln -s "$me" lock 2>&1); do
    [ "$tries" -lt 5 ] || fail busy "somebody 0"
    tries=$((tries + 1))
    if [ ! -L lock ]; then
      [ ! -e lock ] || fail folder "$folder/lock is no link of ours"
      [ "$tries" -lt 5 ] || fail folder "$errors"
      continue
    fi
    holder=$(readlink lock) || continue
    set -- $holder
    if [ "$3" = "$boot" ] && alive "$1" "$2"; then
      [ "$4" = "$takeover" ] || fail busy "$4 $(($(date +%s) - $5))"
      stop_holder "$1" "$2"
    fi
    break_lock "$holder"
  done
  trap leave EXIT
  trap 'exit 11' HUP INT TERM PIPE
}

holds_lock() { [ "$(readlink lock)" = "$me" ]; }

leave() {
  rm -rf "incoming.$token"
  if holds_lock; then rm -f lock; fi
}

enter_folder() { # with the lock, and nothing in it that a cut left behind
  find_tools
  [ -z "$missing" ] || fail tools "$missing"
  errors=$(mkdir -p "$folder" 2>&1) || fail folder "$errors"
  cd "$folder" || fail folder "cannot enter $folder"
  [ -L current ] || [ ! -e current ] || fail folder "$folder/current is no link of ours"
  take_lock
  rm -rf incoming.* current.* previous.* lock.* 2>/dev/null
  errors=$(mkdir -p versions data "incoming.$token" 2>&1) || fail folder "$errors"
}

# --- a version ---

# In a subshell, which becomes the program: a signal to it reaches the trainer, not a shell before
# it. POCKTVM_LAUNCHER is the device's own, such as `nice` or `taskset 3`.
launch() { # DIR OPTIONS...
  program=$1/pocktvm-run
  exec $POCKTVM_LAUNCHER "$program" "$@"
}

verify() { # DIR LIST KIND: every hash of the list
  list=$PWD/$2
  report=$PWD/incoming.$token/report
  if ! (cd "$1" && $sha -c "$list") >"$report" 2>&1; then
    fail "$3" "$(grep -v ': OK$' "$report" | head -n 4)"
  fi
}

self_test() { # DIR
  say "stage self-test"
  result=$(launch "$1" --selftest --json </dev/null 2>"incoming.$token/errors")
  code=$?
  say "selftest $result"
  [ "$code" = 0 ] || fail selftest "$code $result $(tail -n 4 "incoming.$token/errors")"
}

point() { # LINK TARGET: by rename, so that at every moment there is one
  ln -s "$2" "$1.$token" || fail folder "cannot make links in $folder"
  mv -fT "$1.$token" "$1" 2>/dev/null && return
  mv -fh "$1.$token" "$1" 2>/dev/null && return
  rm -f "$1.$token"
  ln -sfn "$2" "$1"
}

current_version() {
  now=$(readlink current 2>/dev/null)
  echo "${now#versions/}"
}

previous_version() {
  before=$(cat "versions/$(current_version).previous" 2>/dev/null)
  [ -z "$before" ] || [ ! -d "versions/$before" ] || echo "$before"
}

switch_to() { # VERSION
  # This line comes before: a client that is gone ends us here, and nothing was switched.
  say "stage switch"
  old=$(current_version)
  [ -d "versions/$old" ] || old=
  if [ "$old" != "$1" ]; then
    # A copy of the same content that got damaged is nothing to go back to.
    case $1 in "${old%-*}"-*) old=$(previous_version) ;; esac
    echo "$old" >"versions/$1.previous" || fail full "versions/$1.previous"
    sync
    holds_lock || fail busy "somebody 0"
    point current "versions/$1"
    sync
  fi
}

tidy() { # the link people see, and no more versions than the two
  keep=$(current_version)
  before=$(previous_version)
  if [ -n "$before" ]; then point previous "versions/$before"; else rm -f previous; fi
  for entry in versions/*; do
    name=${entry#versions/}
    name=${name%.previous}
    name=${name%.sha256}
    case $name in
      "$keep" | "$before") ;;
      *) rm -rf "$entry" ;;
    esac
  done
}

send_file() { # NAME PATH: a line with size and hash, then the bytes
  say "file $1 $(($(wc -c <"$2"))) $($sha <"$2" | cut -d ' ' -f 1)"
  cat "$2"
}
