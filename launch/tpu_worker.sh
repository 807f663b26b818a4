#!/usr/bin/env bash
# What launch/tpu_vm.sh does on each worker of a TPU VM; it comes there with the archive. The run is a
# transient systemd service, `ferjax`: it outlives the ssh session, gets SIGTERM when the VM is shut
# down or preempted, and is started again whenever it ends with 75, and only then.
#
#   tpu_worker.sh setup
#   tpu_worker.sh check WORKDIR
#   tpu_worker.sh run WORKDIR [NAME=VALUE ...] -- ARGS     ARGS: what follows `python`
#   tpu_worker.sh status | stop
#   tpu_worker.sh logs LINES [follow]
#
# --dry-run as the first word prints what would change something instead. Exit status: 0; 2 for what
# the user has to mend; 1 otherwise.
set -euo pipefail

readonly UNIT=ferjax LOCK=/tmp/libtpu_lockfile
code=$HOME/ferjax
venv=$HOME/ferjax-venv
log=$HOME/ferjax.log
script=$HOME/ferjax-run.sh
host=$(hostname)
dry_run=

say() { printf '[%s] %s\n' "$host" "$*" >&2; }
wrong() {
  say "$*"
  exit 2
}

call() {
  if [[ -z $dry_run ]]; then
    "$@"
  else
    local words
    printf -v words ' %q' "$@"
    printf '%s\n' "${words:1}"
  fi
}

# A process that was killed leaves libtpu's lock behind, one that hangs keeps the chips: both make the
# next start fail with "The TPU is already in use". This VM is ours, and no run is active (checked).
free_tpu() {
  local device holders=()
  for device in /dev/accel* /dev/vfio/[0-9]*; do
    [[ ! -e $device ]] || mapfile -t -O "${#holders[@]}" holders < <(
      sudo fuser "$device" 2>/dev/null | tr -s ' ' '\n' | grep -E '^[0-9]+$' || true
    )
  done
  if ((${#holders[@]})); then
    say "ending leftover processes that hold the TPU: ${holders[*]}"
    call sudo kill -TERM "${holders[@]}" || true
    local holder
    for holder in "${holders[@]}"; do
      call timeout 30 tail --pid="$holder" -f /dev/null || true
    done
    call sudo kill -KILL "${holders[@]}" 2>/dev/null || true
  fi
  [[ ! -e $LOCK ]] || say "removing the stale $LOCK"
  call sudo rm -f "$LOCK"
}

# Not is-active: that is also what a finished run is (RemainAfterExit), and not one between two starts.
not_running() {
  case $(status) in
    *" running "* | *" restarting "*) wrong "a run is going on: stop it first" ;;
  esac
}

setup() {
  not_running
  free_tpu
  # The images' own Python is older than 3.11; uv finds or fetches one, and installs in seconds.
  call env PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet --upgrade uv
  local uv=(python3 -m uv --quiet)
  call "${uv[@]}" venv --clear --python 3.11 "$venv"
  (
    [[ -n $dry_run ]] || cd "$code"
    call "${uv[@]}" pip install --python "$venv/bin/python" -c constraints.txt '.[tpu,gcs]'
  )
  call "$venv/bin/python" -c 'import ferjax.main, libtpu'
  say "ready"
}

# Tried as the run will do it: with gcsfs and the VM's service account.
check() {
  local workdir=$1
  [[ -x $venv/bin/python || -n $dry_run ]] || wrong "not set up: launch/tpu_vm.sh setup comes first"
  not_running
  call "$venv/bin/python" - "$workdir" "$host" <<'PYTHON' ||
import sys, uuid
from ferjax.workdir import workdir_path
workdir, host = sys.argv[1:]
try:
    path = workdir_path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f".probe-{host}-{uuid.uuid4().hex}"
    probe.write_text("ferjax")
    assert probe.read_text() == "ferjax"
    probe.unlink()
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
PYTHON
    wrong "$workdir can't be written: create the bucket, and give the VM's service account" \
      "roles/storage.objectUser and roles/storage.legacyBucketReader on it"
}

run() {
  local workdir=$1 text=$'#!/usr/bin/env bash\n' line
  shift
  check "$workdir"
  free_tpu
  # A script, not arguments of systemd-run: the service manager would expand $ and % in them. What
  # --env gives may be a secret.
  umask 077
  while (($#)) && [[ $1 != -- ]]; do
    printf -v line 'export %s=%q\n' "${1%%=*}" "${1#*=}"
    text+=$line
    shift
  done
  (($# > 1)) || wrong "nothing to run"
  shift
  printf -v line ' %q' "$@"
  text+="exec $(printf %q "$venv/bin/python")$line"
  if [[ -n $dry_run ]]; then
    printf '%s\n' "$text"
  else
    rm -f "$script" # one of an earlier version may be everybody's to read
    printf '%s\n' "$text" >"$script"
  fi
  call sudo systemctl reset-failed "$UNIT" 2>/dev/null || true
  call sudo systemctl stop "$UNIT" 2>/dev/null || true # one that finished still holds the name
  local properties=(
    RemainAfterExit=yes         # so that `status` can tell "finished" from "never started"
    RestartForceExitStatus=75   # stopped after saving: go on
    RestartSec=10
    KillMode=mixed              # SIGTERM to the trainer alone, not to its data workers
    TimeoutStopSec=120
    LimitMEMLOCK=infinity       # the TPU driver pins memory
    LimitNOFILE=1048576
    "StandardOutput=append:$log"
    "StandardError=append:$log"
  )
  call sudo systemd-run --quiet --unit="$UNIT" --uid="$(id -un)" --gid="$(id -gn)" \
    --working-directory="$code" --setenv=PYTHONUNBUFFERED=1 "${properties[@]/#/--property=}" \
    /bin/bash "$script"
  [[ -n $dry_run ]] || say "started: $(tail -n 1 "$script")"
}

# "ferjax-worker HOST STATE STATUS restarts=N"; STATE: none, running, restarting, done, stopped, failed.
status() {
  local ActiveState='' SubState='' LoadState='' ExecMainStatus='' ExecMainCode='' NRestarts=''
  local key value state
  while IFS='=' read -r key value; do
    case $key in
      ActiveState | SubState | LoadState | ExecMainStatus | ExecMainCode | NRestarts)
        printf -v "$key" '%s' "$value"
        ;;
    esac
  done < <(systemctl show "$UNIT" -p ActiveState,SubState,LoadState,ExecMainStatus,ExecMainCode,NRestarts)
  case $LoadState/$ActiveState/$SubState in
    not-found/*) state=none ;;
    */active/exited)
      # systemd takes death by SIGTERM for success.
      if [[ $ExecMainCode/$ExecMainStatus == 1/0 ]]; then state='done'; else state=failed; fi
      ;;
    */active/* | */deactivating/*) state=running ;;
    */activating/*) state=restarting ;;
    */failed/*) if [[ $ExecMainStatus == 75 ]]; then state=stopped; else state=failed; fi ;;
    *) state=none ;;
  esac
  # Killed by a signal: as a shell would say it.
  if [[ $state == failed && ($ExecMainCode == 2 || $ExecMainCode == 3) ]]; then
    ExecMainStatus=$((128 + ExecMainStatus))
  fi
  echo "ferjax-worker $host $state ${ExecMainStatus:-0} restarts=${NRestarts:-0}"
}

stop() {
  # A finished one is left, so that `status` still knows of it.
  if [[ $(status) != *" done "* ]]; then
    call sudo systemctl stop "$UNIT" || true # not loaded: nothing runs
  fi
  free_tpu
  status
}

logs() {
  [[ -e $log ]] || wrong "no log: nothing was started here"
  if [[ ${2:-} == follow ]]; then
    tail -n "$1" -F "$log" | sed -u "s/^/[$host] /"
  else
    tail -n "$1" "$log" | sed "s/^/[$host] /"
  fi
}

if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
case ${1:-} in
  setup | status | stop) "$1" ;;
  check | run) (($# > 1)) && "$@" ;;
  logs) logs "${2:-100}" "${3:-}" ;;
  *) wrong "give setup, check, run, status, stop or logs" ;;
esac
