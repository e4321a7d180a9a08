# Upload (a tar on stdin), verify, test, switch. More values: version hashes reuse payload
# data_name data_hash.
say hello
find_place
enter_folder
fresh=incoming.$token
if [ "$payload" = yes ]; then
  say "stage upload"
  errors=$(tar -xf - -C "$fresh" 2>&1)
  code=$?
  [ "$code" = 0 ] || fail upload "$code $errors"
fi
say "stage verify"
printf '%s\n' "$hashes" >"$fresh/hashes" || fail full "$folder"
if [ "$reuse" = yes ]; then place=versions/$version; else place=$fresh/artifact; fi
[ -d "$place" ] || fail damaged "$place is not there"
verify "$place" "$fresh/hashes" damaged
if [ -n "$data_name" ]; then
  printf '%s  %s\n' "$data_hash" "$data_name" >"$fresh/data-hash"
  if [ -f "$fresh/$data_name" ]; then mv -f "$fresh/$data_name" "data/$data_name"; fi
  verify data "$fresh/data-hash" damaged
  for entry in data/*; do
    [ "$entry" = "data/$data_name" ] || rm -rf "$entry"
  done
fi
self_test "$place"
if [ "$reuse" != yes ]; then
  mv "$fresh/hashes" "versions/$version.sha256" && mv "$place" "versions/$version" ||
    fail folder "cannot rename inside $folder"
fi
switch_to "$version"
tidy
say "done $(previous_version)"
