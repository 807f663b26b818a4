# shellcheck shell=bash disable=SC2034
# Sourced by tpu_vm.sh and tpu_queued.sh: flags, errors, and the way to gcloud.
#
# Nothing here knows a project, a zone or an account: they come from flags or from the environment
# (FERJAX_PROJECT, FERJAX_ZONE, FERJAX_TPU, FERJAX_ACCELERATOR, FERJAX_WORKDIR), and gcloud brings
# the user's own credentials. (SC2034: what is set here is read by those two.)

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "bash 4.4 or newer is needed (macOS: brew install bash coreutils gnu-sed)" >&2
  exit 2
fi
readonly EXIT_FAILED=1 EXIT_USER=2 EXIT_RUNNING=3 EXIT_NOTHING=4 EXIT_NO_NODE=5 EXIT_NO_ANSWER=6
readonly EXIT_AGAIN=75
me=$(basename "$0")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

project=${FERJAX_PROJECT:-}
zone=${FERJAX_ZONE:-}
name=${FERJAX_TPU:-}
accelerator=${FERJAX_ACCELERATOR:-}
workdir=${FERJAX_WORKDIR:-}
runtime=
tier=
service_account=
network=
subnetwork=
internal_ip=
dry_run=
environment=()
arguments=()

say() { printf '%s: %s\n' "$me" "$*" >&2; }
wrong() {
  say "$*"
  exit "$EXIT_USER"
}
fail() {
  say "$*"
  exit "$EXIT_FAILED"
}

# Flags that both scripts know; returns 1 at another one. What follows -- is left in `arguments`.
common_flag() {
  case $1 in
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --tier=*) tier=${1#*=} ;;
    --service-account=*) service_account=${1#*=} ;;
    --network=*) network=${1#*=} ;;
    --subnetwork=*) subnetwork=${1#*=} ;;
    --internal-ip) internal_ip=yes ;;
    --env=*)
      [[ ${1#*=} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || wrong "$1: give --env=NAME=VALUE"
      environment+=("${1#*=}")
      ;;
    --dry-run) dry_run=yes ;;
    *) return 1 ;;
  esac
}

# require FLAG VARIABLE VALUE EXAMPLE
require() {
  [[ -n $3 ]] || wrong "$1 is missing: give it, or set $2 (for example $4)"
}

require_place() {
  require --project FERJAX_PROJECT "$project" "the id that 'gcloud projects list' shows"
  require --zone FERJAX_ZONE "$zone" us-west4-a
  require --name FERJAX_TPU "$name" ferjax-1
  [[ $name =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] ||
    wrong "--name=$name: lower-case letters, digits and hyphens, a letter first, 63 at most"
  [[ -n $dry_run ]] || command -v gcloud >/dev/null ||
    wrong "gcloud is not installed: see https://cloud.google.com/sdk/docs/install"
}

require_accelerator() {
  require --accelerator FERJAX_ACCELERATOR "$accelerator" v5litepod-16
  [[ -n $runtime ]] || runtime=$(runtime_of "$accelerator")
  case $tier in
    on-demand | spot | reserved) ;;
    *) wrong "--tier=$tier: on-demand, spot or reserved" ;;
  esac
}

# The image that Cloud TPU's table of software versions names for JAX on each generation.
runtime_of() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-* | v5e-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) wrong "--accelerator=$1 is not known here: name its image with --runtime=VERSION" ;;
  esac
}

# check_workdir MULTI_HOST: its form alone; that it can be written is tried on the workers.
check_workdir() {
  require --workdir FERJAX_WORKDIR "$workdir" gs://BUCKET/fixmatch
  if [[ $workdir == gs://* ]]; then
    [[ $workdir =~ ^gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]/[^/].*$ ]] ||
      wrong "--workdir=$workdir: give gs://BUCKET/PATH, a folder for this run in a bucket"
  elif [[ -n $1 ]]; then
    wrong "--workdir=$workdir is on each worker's own disk: several hosts need gs://BUCKET/PATH"
  elif [[ $workdir != /* ]]; then
    wrong "--workdir=$workdir: give gs://BUCKET/PATH, or a full path outside ~/ferjax, which setup empties"
  fi
  local argument
  for argument in "${arguments[@]}"; do
    [[ $argument != --workdir* ]] || wrong "give --workdir before --, not after it"
  done
}

# quoted WORD...: one line that a shell reads back as these words.
quoted() {
  local word line=
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s' "${line# }"
}

# call WORD...: runs it, or with --dry-run prints it.
call() {
  if [[ -n $dry_run ]]; then printf '%s\n' "$(quoted "$@")"; else "$@"; fi
}

tpu_vm() {
  local verb=$1
  shift
  call gcloud compute tpus tpu-vm "$verb" "$@" --project="$project" --zone="$zone"
}

create_flags() {
  local flags=(--accelerator-type="$accelerator" --scopes=https://www.googleapis.com/auth/cloud-platform)
  case $tier in
    spot) flags+=(--spot) ;;
    reserved) flags+=(--reserved) ;;
  esac
  [[ -z $service_account ]] || flags+=(--service-account="$service_account")
  [[ -z $network ]] || flags+=(--network="$network")
  [[ -z $subnetwork ]] || flags+=(--subnetwork="$subnetwork")
  [[ -z $internal_ip ]] || flags+=(--internal-ips)
  printf '%s\n' "${flags[@]}"
}

# node ASSUMED: sets node_state (NONE if there is none) and workers; a dry run takes ASSUMED, and two
# workers, since it asks nothing. Fails if gcloud can't say.
node() {
  local list
  list=$(tpu_vm list "--format=value(name.basename(),state,networkEndpoints.len())") || return
  if [[ -n $dry_run ]]; then
    printf '%s\n' "$list"
    node_state=$1 workers=2
    return
  fi
  node_state=$(awk -v name="$name" '$1 == name { print $2 }' <<<"$list")
  workers=$(awk -v name="$name" '$1 == name { print $3 }' <<<"$list")
  node_state=${node_state:-NONE}
}

# on_workers COMMAND: on all of them at once; fails if it fails on any.
on_workers() {
  local flags=()
  [[ -z $internal_ip ]] || flags+=(--internal-ip)
  # --quiet: nobody may be there to answer a question.
  tpu_vm ssh "$name" --worker=all --quiet "${flags[@]}" --command="$1"
}
