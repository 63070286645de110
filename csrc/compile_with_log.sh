# compile_with_log.sh LOG COMMAND...: runs a compile, keeps what it says in LOG, and fails where ptxas gives a notice of
# the C75xx family: an ignored setmaxnreg, or wgmma that runs one at a time. ptxas calls these info, -Werror misses them.
log=$1
shift
"$@" >"$log" 2>&1
status=$?
if [ $status -eq 0 ] && grep -qE '\(C75[0-9][0-9]\)' "$log"; then
  echo "error: a ptxas notice of the C75xx family counts as an error (kernels would run serialised)" >>"$log"
  status=1
fi
# The figures of ptxas -v are for the log; the rest is for whoever builds.
grep -vE 'ptxas info +: (Used|Compil|Function|[0-9]+ bytes)|bytes stack frame|^$' "$log" >&2
if [ $status -ne 0 ]; then
  echo "the whole report is in $log" >&2
  for object; do :; done
  rm -f "$object"
fi
exit $status
