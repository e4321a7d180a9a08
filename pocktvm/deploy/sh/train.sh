# Train the deployed version; the positional arguments are pocktvm-run's. More values: version
# data_name fetch. stdin stays open while the client is there: its end stops the trainer, which
# saves.
say hello
find_place
enter_folder
fresh=incoming.$token
[ -x "versions/$version/pocktvm-run" ] || fail replaced "$version"
[ -z "$data_name" ] || set -- "$@" --data "data/$data_name"
case $POCKTVM_LAUNCHER in *qemu-*) set -- "$@" --emulated ;; esac
say "stage train"
exec 3<&0
launch "versions/$version" "$@" --json --progress --die-with-parent \
  --save "$PWD/checkpoint.safetensors" --save-every 60s \
  </dev/null 3<&- 2>&1 >"$fresh/result" &
child=$!
{
  cat <&3
  kill -TERM "$child"
} >/dev/null 2>&1 &
watch=$!
trap 'kill -TERM "$child" 2>/dev/null; wait "$child"; exit 11' HUP INT TERM PIPE
wait "$child"
code=$?
kill "$watch" 2>/dev/null
say "trained $code"
if [ -s "$fresh/result" ]; then send_file result "$fresh/result"; fi
case $code in 0 | 130 | 143) ;; *) fail train "$code" ;; esac
if [ "$fetch" = yes ]; then
  say "stage fetch"
  send_file checkpoint checkpoint.safetensors
fi
say "done $folder/checkpoint.safetensors"
