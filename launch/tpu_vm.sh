#!/usr/bin/env bash
# One Cloud TPU VM, single- or multi-host, from nothing to a finished run. Every command acts on all
# its workers. launch/README.md has the whole path.
#
#   launch/tpu_vm.sh COMMAND --project=ID --zone=ZONE --name=NAME [FLAGS] [-- ARGS]
#
#   create   --accelerator=TYPE [--tier=on-demand|spot|reserved] [--runtime=IMAGE]
#            [--service-account=EMAIL] [--network=N] [--subnetwork=N] [--internal-ip]
#            also starts one that is stopped, and replaces one that was preempted
#   setup    copies this clone's last commit to the workers and installs it there
#   run      --workdir=gs://BUCKET/PATH [--env=NAME=VALUE ...] -- ARGS
#            ARGS: what follows `python`, such as -m ferjax.main --config=configs/fixmatch.py:pod;
#            the run survives this session and starts again whenever it ends with 75
#   status   exit status: 0 finished, 1 or 2 the run failed so, 3 running, 4 nothing was started,
#            5 no node that is READY, 6 a worker did not answer, 75 stopped after saving
#   logs     [--lines=N] [--follow]
#   stop     saves and ends the run; [--vm] stops the VM too (a single-host one)
#   delete   the VM and its disk; what is in gs:// stays
#
# --dry-run prints the gcloud commands instead; PROJECT and so on may come from FERJAX_PROJECT,
# FERJAX_ZONE, FERJAX_TPU, FERJAX_ACCELERATOR and FERJAX_WORKDIR. Exit status: 0, or 2 for wrong
# flags, or 1 when a gcloud command failed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_common.sh"

lines=100
follow=
stop_vm=
archive=

create() {
  require_accelerator
  node NONE || fail "can't list the TPU VMs of $zone"
  case $node_state in
    NONE) ;;
    READY)
      say "$name is there already"
      return
      ;;
    STOPPED)
      tpu_vm start "$name" || fail "$name could not be started"
      return
      ;;
    PREEMPTED | TERMINATED)
      say "$name was preempted: replacing it"
      tpu_vm delete "$name" --quiet || fail "$name could not be deleted"
      ;;
    *) fail "$name is $node_state: wait, then look with 'status'" ;;
  esac
  local flags
  mapfile -t flags < <(create_flags)
  tpu_vm create "$name" --version="$runtime" "${flags[@]}" ||
    fail "$name was not created; without capacity, another zone or launch/tpu_queued.sh may help"
}

# ready: stops here unless the node can be reached; multi_host is set when it has several workers.
ready() {
  node READY || fail "can't list the TPU VMs of $zone"
  multi_host=
  case $node_state in
    READY) [[ $workers == 1 ]] || multi_host=yes ;;
    NONE) fail "there is no TPU VM $name in $zone: 'create' makes it" ;;
    PREEMPTED | TERMINATED) fail "$name was preempted: 'create' replaces it, then 'setup', 'run'" ;;
    *) fail "$name is $node_state, not READY" ;;
  esac
}

setup() {
  git -C "$root" rev-parse --verify --quiet HEAD >/dev/null ||
    wrong "$root is no git clone with a commit: the workers get its last commit"
  [[ -z $(git -C "$root" status --porcelain 2>/dev/null) ]] ||
    say "what is not committed in $root does not reach the workers"
  ready
  if [[ -n $dry_run ]]; then
    archive=/tmp/ferjax.tar.gz
  else
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
  fi
  call git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  local flags=()
  [[ -z $internal_ip ]] || flags+=(--internal-ip)
  tpu_vm scp "$archive" "$name:ferjax.tar.gz" --worker=all --quiet "${flags[@]}" ||
    fail "the archive did not reach every worker"
  on_workers "$(remote_setup)" || fail "setup failed on a worker; what it said is above"
}

# The archive brings tpu_worker.sh, so this much has to be spelled out.
remote_setup() {
  cat <<'REMOTE'
set -eu
case $(systemctl show ferjax -p SubState) in
  SubState=dead | SubState=exited | SubState=failed) ;;
  *) echo "a run is going on: stop it first" >&2; exit 2 ;;
esac
rm -rf ferjax && mkdir ferjax && tar -xzf ferjax.tar.gz -C ferjax
bash ferjax/launch/tpu_worker.sh setup
REMOTE
}

run() {
  ((${#arguments[@]})) || wrong "nothing to run: give -- and what follows python"
  ready
  check_workdir "$multi_host"
  local words=(bash ferjax/launch/tpu_worker.sh run "$workdir" "${environment[@]}" --
    "${arguments[@]}" "--workdir=$workdir")
  # Everywhere before anywhere: a worker that can't start leaves the others waiting for it.
  on_workers "$(quoted bash ferjax/launch/tpu_worker.sh check "$workdir")" ||
    fail "not started: a worker is not ready, what it said is above"
  on_workers "$(quoted "${words[@]}")" || {
    say "the run did not start on every worker: stopping it on the others"
    on_workers "bash ferjax/launch/tpu_worker.sh stop" || true
    fail "not started"
  }
}

status() {
  node READY || exit "$EXIT_NO_ANSWER"
  if [[ $node_state != READY ]]; then
    echo "node $node_state"
    exit "$EXIT_NO_NODE"
  fi
  local answer ask="bash ferjax/launch/tpu_worker.sh status"
  ask="if [ -d ferjax ]; then $ask; else echo \"ferjax-worker \$(hostname) none\"; fi"
  answer=$(on_workers "$ask") || { say "a worker did not answer" && exit "$EXIT_NO_ANSWER"; }
  if [[ -n $dry_run ]]; then
    printf '%s\n' "$answer"
    return
  fi
  answer=$(grep '^ferjax-worker ' <<<"$answer" | sort) || true
  echo "node READY, $workers workers"
  printf '%s\n' "$answer"
  [[ $(grep -c . <<<"$answer") == "$workers" ]] || exit "$EXIT_NO_ANSWER"
  verdict "$answer"
}

# verdict LINES "ferjax-worker HOST STATE STATUS ...": one exit status for all workers.
verdict() {
  local states worst
  states=$(awk '{ print $3 }' <<<"$1" | sort -u | tr '\n' ' ')
  worst=$(awk '$3 == "failed" { print $4 }' <<<"$1" | sort -u | tr '\n' ' ')
  case $worst in
    '') ;;
    '2 ') exit "$EXIT_USER" ;; # all that failed said that what the user gave is wrong
    *) exit "$EXIT_FAILED" ;;
  esac
  case $states in
    'done ') ;;
    'none ') exit "$EXIT_NOTHING" ;;
    *none*) exit "$EXIT_FAILED" ;; # one forgot its run (it was rebooted): the others wait for it
    *running* | *restarting*) exit "$EXIT_RUNNING" ;;
    *) exit "$EXIT_AGAIN" ;; # stopped, all or some
  esac
}

logs() {
  [[ $lines =~ ^[0-9]+$ ]] || wrong "--lines=$lines is not a number"
  ready
  on_workers "bash ferjax/launch/tpu_worker.sh logs $lines $follow" ||
    fail "a worker did not give its log"
}

stop() {
  ready
  [[ -z $stop_vm || -z $multi_host || -n $dry_run ]] ||
    wrong "--vm: a TPU VM of several hosts can't be stopped, only deleted"
  on_workers "bash ferjax/launch/tpu_worker.sh stop" || fail "a worker could not stop its run"
  [[ -z $stop_vm ]] || tpu_vm stop "$name" || fail "$name could not be stopped"
}

delete() {
  node READY || fail "can't list the TPU VMs of $zone"
  if [[ $node_state == NONE ]]; then
    say "there is no TPU VM $name in $zone"
    return
  fi
  tpu_vm delete "$name" --quiet || fail "$name could not be deleted: it may still cost money"
}

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

task=${1:-}
case $task in
  create | setup | run | status | logs | stop | delete) shift ;;
  -h | --help) usage && exit ;;
  *) wrong "give a command: create, setup, run, status, logs, stop or delete (--help explains)" ;;
esac
tier=on-demand
while (($#)); do
  case $1 in
    -h | --help) usage && exit ;;
    --lines=*) lines=${1#*=} ;;
    --follow) follow=follow ;;
    --vm) stop_vm=yes ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) common_flag "$1" || wrong "unknown flag $1 (--help lists them; flags are --name=value)" ;;
  esac
  shift
done
require_place
"$task"
