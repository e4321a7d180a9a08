# Back to the version that the current one replaced, after testing it again.
say hello
find_place
enter_folder
version=$(previous_version)
[ -n "$version" ] || fail previous "$(current_version)"
say "stage verify"
verify "versions/$version" "versions/$version.sha256" damaged
self_test "versions/$version"
switch_to "$version"
tidy
say "done $version $(previous_version)"
