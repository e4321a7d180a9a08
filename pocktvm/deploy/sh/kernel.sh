# Runs one program (a tar on stdin: kernel, inputs) for so many seconds; leaves nothing behind.
# Values: seconds threads.
say hello
find_tools
[ -z "$missing" ] || fail tools "$missing"
say "stage upload"
work=$(mktemp -d) || fail folder "no temporary folder"
trap 'rm -rf "$work"' EXIT
trap 'exit 11' HUP INT TERM PIPE
errors=$(tar -xf - -C "$work" 2>&1) || fail upload "$errors"
say "stage run"
limit=
if command -v timeout >/dev/null 2>&1; then limit="timeout $seconds"; fi
$limit $POCKTVM_LAUNCHER "$work/kernel" "$threads" <"$work/inputs" >"$work/result" 2>"$work/errors"
code=$?
[ "$code" = 0 ] || fail kernel "it ended with $code: $(tail -n 2 "$work/errors")"
send_file result "$work/result"
say "done"
