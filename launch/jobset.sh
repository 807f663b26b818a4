#!/usr/bin/env bash
# Fills in launch/jobset.yaml (tpu) or launch/jobset_gpu.yaml (gpu) and applies it.
#
#   launch/jobset.sh tpu|gpu --name=NAME --image=IMAGE ... --workdir=gs://BUCKET/PATH [--dry-run] -- ARGS
#
# Each placeholder of the file is a flag of that name in lower case with hyphens (--image=..., --hosts=4)
# or a variable of the environment (IMAGE=...); the file says what each means. ARGS: what follows
# `python`. --dry-run prints the manifest instead: it can be piped into `kubectl diff -f -` or
# `kubectl apply --dry-run=server -f -`. Exit status: kubectl's; 2 when something is missing.
set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "bash 4.4 or newer is needed (macOS: brew install bash coreutils gnu-sed)" >&2
  exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
declare -A values=()
workdir=${FERJAX_WORKDIR:-}
dry_run=
arguments=()

wrong() {
  printf 'jobset.sh: %s\n' "$*" >&2
  exit 2
}

# A JSON string is also a YAML one.
json() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

case ${1:-} in
  tpu) file=$here/jobset.yaml ;;
  gpu) file=$here/jobset_gpu.yaml ;;
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
  *) wrong "give tpu or gpu first (--help explains)" ;;
esac
shift
# shellcheck disable=SC2016 # the placeholders are meant as they stand
mapfile -t names < <(grep -v '^#' "$file" | grep -oE '\$\{[A-Z_]+\}' | tr -d '${}' | sort -u | grep -vx ARGS)

while (($#)); do
  case $1 in
    --dry-run) dry_run=yes ;;
    --workdir=*) workdir=${1#*=} ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    --*=*)
      flag=${1%%=*}
      key=${flag#--}
      key=${key//-/_}
      key=${key^^}
      [[ " ${names[*]} " == *" $key "* ]] || wrong "unknown flag $flag: $(basename "$file") has ${names[*]}"
      values[$key]=${1#*=}
      ;;
    *) wrong "unexpected $1: flags are --name=value" ;;
  esac
  shift
done

[[ $workdir =~ ^gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]/[^/].*$ ]] ||
  wrong "--workdir=$workdir: give gs://BUCKET/PATH; a pod's own disk goes with it"
((${#arguments[@]})) || wrong "nothing to run: give -- and what follows python"
for name in "${names[@]}"; do
  flag=--${name,,}
  value=${values[$name]-${!name-}}
  [[ -n $value ]] || wrong "${flag//_/-} is missing: give it, or set $name ($(basename "$file") says what it is)"
  case $name in
    HOSTS | *_PER_HOST) [[ $value =~ ^[1-9][0-9]*$ ]] || wrong "${flag//_/-}=$value is no number above 0" ;;
    # No room for anything that would be YAML.
    *) [[ $value =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] || wrong "${flag//_/-}=$value has a character it can't have" ;;
  esac
  values[$name]=$value
done

list=
for argument in "${arguments[@]}" "--workdir=$workdir"; do
  [[ $argument != *$'\n'* ]] || wrong "an argument has a line break"
  # Kubernetes would read $(X) in an argument as a variable; $$ is its way to write $.
  list+="${list:+, }$(json "${argument//\$/\$\$}")"
done
manifest=$(grep -v '^#' "$file")
for name in "${names[@]}"; do
  manifest=${manifest//"\${$name}"/"${values[$name]}"}
done
# shellcheck disable=SC2016
manifest=${manifest//'${ARGS}'/"[$list]"}
if [[ -n $dry_run ]]; then
  printf '%s\n' "$manifest"
else
  command -v kubectl >/dev/null || wrong "kubectl is not installed"
  # `apply` would leave a finished one as it is and say that all is well.
  ! kubectl get jobset "${values[NAME]}" >/dev/null 2>&1 ||
    wrong "${values[NAME]} is there already: kubectl delete jobset ${values[NAME]} first (the workdir stays)"
  kubectl apply -f - <<<"$manifest"
fi
