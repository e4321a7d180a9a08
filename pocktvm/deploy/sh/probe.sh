# What the device is, and what it has; changes nothing.
say hello
find_place
find_tools
say "fact system $(uname -s)"
say "fact machine $(uname -m)"
say "fact bits $(getconf LONG_BIT 2>/dev/null)"
libc=$(getconf GNU_LIBC_VERSION 2>/dev/null)
if [ -z "$libc" ] && command -v ldd >/dev/null 2>&1; then
  libc=$(ldd --version 2>&1 | head -n 1)
fi
say "fact libc $libc"
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || nproc 2>/dev/null)
say "fact cores $cores"
set -- $(grep '^MemTotal:' /proc/meminfo 2>/dev/null)
say "fact memory_kib ${2:-}"
set -- $(grep '^MemAvailable:' /proc/meminfo 2>/dev/null)
say "fact free_kib ${2:-}"
at=$folder
while [ -n "$at" ] && [ ! -d "$at" ]; do at=${at%/*}; done
at=${at:-/}
set -- $(df -Pk "$at" 2>/dev/null | tail -n 1)
say "fact disk_kib ${4:-}"
if [ -w "$at" ]; then say "fact writable yes"; else say "fact writable no"; fi
say "fact missing$missing"
say "fact board $(tr -d '\000' 2>/dev/null </proc/device-tree/model)"
say "fact launcher ${POCKTVM_LAUNCHER:-}"
if cd "$folder" 2>/dev/null; then
  say "fact current $(current_version)"
  say "fact previous $(previous_version)"
  say "fact versions $(for f in versions/*.sha256; do n=${f#*/}; echo "${n%.sha256}"; done | tr '\n' ' ')"
  say "fact data $(for f in data/*.safetensors; do echo "${f#*/}"; done | tr '\n' ' ')"
fi
say "done"
