#!/usr/bin/env bash
# A run on a queued Cloud TPU, spot by default: asks for it, waits, sets it up, starts the run, and
# when the TPU is preempted asks again and goes on in the same workdir. Leave it running (in tmux, or
# on a small VM) until the run has ended; started again, it goes on from whatever it finds.
#
#   launch/tpu_queued.sh --project=ID --zone=ZONE --name=NAME --accelerator=TYPE \
#     --workdir=gs://BUCKET/PATH [FLAGS] -- ARGS
#   launch/tpu_queued.sh status|delete --project=ID --zone=ZONE --name=NAME
#
#   --tier=spot|on-demand|reserved   spot if not given
#   --keep            leave the TPU when the run has ended; else it is deleted, so that it costs
#                     nothing more, after the last lines of each worker's log were printed
#   --poll=SECONDS    60
#   --max-failures=N  3: so often the run is started again after a failure that is not the user's
#   --max-refusals=N  3: so often in a row the request may end as FAILED or, once granted, be refused
#   --runtime=IMAGE --service-account=EMAIL --network=N --subnetwork=N --internal-ip --env=NAME=VALUE
#   --dry-run         prints the gcloud commands of one undisturbed run instead
#
# ARGS: what follows `python`. The TPU VM has the same NAME: launch/tpu_vm.sh logs and stop work on it.
# Exit status: 0 the run finished; 2 what you gave is wrong (by flags, or says the run); 75 the run was
# stopped after saving by someone else; 1 anything else.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_common.sh"

poll=60
max_failures=3
max_refusals=3
max_silences=10 # polls in a row on which the workers don't answer though their node is READY
keep=

queued() {
  local verb=$1
  shift
  call gcloud compute tpus queued-resources "$verb" "$@" --project="$project" --zone="$zone"
}

# request ASSUMED: sets request_state, NONE if there is none; a dry run takes ASSUMED. Fails if gcloud
# can't say.
request() {
  local list
  list=$(queued list "--format=value(name.basename(),state.state)") || return
  if [[ -n $dry_run ]]; then
    printf '%s\n' "$list"
    request_state=$1
    return
  fi
  request_state=$(awk -v name="$name" '$1 == name { print $2 }' <<<"$list")
  request_state=${request_state:-NONE}
}

# Both fail as gcloud does, which may be a fault of the moment.
create() {
  local flags
  mapfile -t flags < <(create_flags)
  queued create "$name" --node-id="$name" --runtime-version="$runtime" "${flags[@]}"
}

delete() {
  queued delete "$name" --force --quiet
}

delete_now() {
  delete || fail "$name could not be deleted: it may still cost money"
}

# Once more at the next look, if it fails.
delete_then() {
  if delete; then
    undeleted=0
    return
  fi
  undeleted=$((undeleted + 1))
  ((undeleted < max_refusals)) || fail "$name could not be deleted: it may still cost money"
  sleep "$poll"
  return 1
}

vm() {
  local verb=$1 words
  shift
  words=("$root/launch/tpu_vm.sh" "$verb" "--project=$project" "--zone=$zone" "--name=$name")
  [[ -z $internal_ip ]] || words+=(--internal-ip)
  [[ -z $dry_run ]] || words+=(--dry-run)
  "${words[@]}" "$@"
}

start_run() {
  vm run "--workdir=$workdir" "${environment[@]/#/--env=}" -- "${arguments[@]}"
}

# finish STATUS TEXT: the end, with or without the TPU.
finish() {
  say "$2"
  if [[ -n $keep ]]; then
    say "$name is left as it is and costs money: launch/tpu_queued.sh delete ends that"
  else
    vm logs --lines=50 || true
    delete_now
  fi
  exit "$1"
}

train() {
  require_accelerator
  ((${#arguments[@]})) || wrong "nothing to run: give -- and what follows python"
  check_workdir yes # whatever the number of hosts: a spot VM's disk goes with it
  [[ $poll =~ ^[0-9]+$ && $max_failures =~ ^[0-9]+$ && $max_refusals =~ ^[1-9][0-9]*$ ]] ||
    wrong "--poll, --max-failures and --max-refusals are whole numbers"
  local bucket=${workdir#gs://} listed
  listed=$(call gcloud storage ls "gs://${bucket%%/*}" --project="$project") ||
    wrong "--workdir: gs://${bucket%%/*} can't be listed: create it, in the region of $zone"
  if [[ -n $dry_run ]]; then
    printf '%s\n' "$listed"
    plan
    return
  fi
  # Under these eyes: granted: there was a TPU; set_up: this clone is on it; seen: its run was running.
  local failures=0 refusals=0 silences=0 undeleted=0 granted='' set_up='' seen='' said=''
  while true; do
    if ! request '' || { [[ $request_state == ACTIVE ]] && ! node ''; }; then
      say "gcloud did not answer; trying again in $poll s"
      sleep "$poll"
      continue
    fi
    [[ $request_state == "$said" ]] || say "$name: $request_state"
    said=$request_state
    case $request_state in
      NONE)
        set_up='' seen=''
        create || {
          # What was granted once is asked for rightly.
          refusals=$((refusals + 1))
          if [[ -z $granted ]] || ((refusals >= max_refusals)); then
            fail "the request was refused; what gcloud said is above"
          fi
          sleep "$poll"
        }
        ;;
      FAILED)
        delete_then || continue
        [[ -n $seen ]] || refusals=$((refusals + 1))
        ((refusals < max_refusals)) ||
          fail "the request ended as FAILED $refusals times: see the message above, quota and zone"
        ;;
      SUSPENDED)
        say "preempted: asking for another, the run goes on from $workdir"
        delete_then || continue
        ;;
      ACTIVE)
        granted=yes refusals=0
        active
        ;;
      *) sleep "$poll" ;; # in the queue, or on its way in or out
    esac
  done
}

# One look at a TPU that was granted.
active() {
  case $node_state in
    READY) ;;
    PREEMPTED | TERMINATED)
      say "preempted: asking for another, the run goes on from $workdir"
      delete_then || true
      return
      ;;
    *)
      sleep "$poll"
      return
      ;;
  esac
  local state=0
  vm status >/dev/null || state=$?
  [[ $state == "$EXIT_NO_ANSWER" ]] || silences=0
  case $state in
    "$EXIT_RUNNING")
      seen=yes
      sleep "$poll"
      ;;
    "$EXIT_NO_NODE") sleep "$poll" ;;
    "$EXIT_NO_ANSWER")
      silences=$((silences + 1))
      # Not deleted: the fault may be this machine's network, and the run sound.
      ((silences < max_silences)) ||
        fail "the workers of $name don't answer; it is left as it is and costs money"
      sleep "$poll"
      ;;
    *)
      # How an earlier run on it ended is not this one's end: it may have been mended since.
      [[ -z $seen ]] || ended "$state"
      begin
      ;;
  esac
}

# ended STATUS of the run: the end, or it is to be started again.
ended() {
  case $1 in
    0) finish 0 "the run has finished: $workdir" ;;
    "$EXIT_AGAIN") finish "$EXIT_AGAIN" "the run was stopped after saving: start this again to go on" ;;
    "$EXIT_USER") finish "$EXIT_USER" "the run says that what it was given is wrong; its log:" ;;
  esac
  failures=$((failures + 1)) # it failed, or a worker was rebooted and knows nothing of it
  ((failures <= max_failures)) || finish "$EXIT_FAILED" "the run failed $failures times; its log:"
  say "the run failed or was lost: starting it again ($failures of $max_failures)"
  vm stop || true
}

begin() {
  if { [[ -n $set_up ]] || vm setup; } && set_up=yes && start_run; then
    seen=yes
    return
  fi
  failures=$((failures + 1))
  ((failures <= max_failures)) || finish "$EXIT_FAILED" "it could not be started; its log:"
  set_up=
  sleep "$poll"
}

plan() {
  request NONE
  create
  request ACTIVE
  vm status
  vm setup
  start_run
  vm status
  [[ -n $keep ]] || { vm logs --lines=50 && delete; }
}

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

task=train
case ${1:-} in
  status | delete)
    task=$1
    shift
    ;;
esac
tier=spot
while (($#)); do
  case $1 in
    -h | --help) usage && exit ;;
    --poll=*) poll=${1#*=} ;;
    --max-failures=*) max_failures=${1#*=} ;;
    --max-refusals=*) max_refusals=${1#*=} ;;
    --keep) keep=yes ;;
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
case $task in
  train) train ;;
  delete)
    request ACTIVE || fail "can't list the queued resources of $zone"
    if [[ $request_state == NONE ]]; then say "there is no $name in $zone"; else delete_now; fi
    ;;
  status)
    request ACTIVE || fail "can't list the queued resources of $zone"
    echo "request $request_state"
    [[ $request_state == ACTIVE ]] || exit "$EXIT_NO_NODE"
    vm status
    ;;
esac
