"""A stand-in for gcloud, and for what a TPU worker has, put on PATH by cloud_harness.py.

It takes only what gcloud_grammar.json lists, records each call, and plays a story from state.json
in the directory FAKE_CLOUD. Commands for workers really run, in a directory for each worker that is
its HOME, with systemd, uv and sudo replaced by the scripts TOOLS below.

state.json:
  workers   how many hosts a node has
  node      its state, or null; changed by create, delete, start, stop and the story
  request   the queued resource's state, or null
  grants    one for each request that is created: {"states": what `list` says before ACTIVE (FAILED
            stays), "runs": [tokens of the first run, of the second, ...]}
  runs      the same for a node that is there already
  faults    [{"call": "tpu-vm ssh", "has": text, "worker": 1 or null, "status": 255, "times": 1,
             "after": 0}]: so many calls of it go well before

A run's tokens are taken one for each time that all workers are asked for its state: "running",
"done", "stopped", "failed 2" (or for each worker: "failed 134/running"), "rebooted", "preempted".
"""

import json
import os
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ.get("FAKE_CLOUD", "/nonexistent"))
GRAMMAR = json.loads(Path(__file__).with_name("gcloud_grammar.json").read_text())


class Gcloud:
    def __init__(self, argv):
        self.argv, self.state = argv, json.loads((CLOUD / "state.json").read_text())
        with (CLOUD / "calls.jsonl").open("a") as file:
            file.write(json.dumps(argv) + "\n")

    def main(self):
        name, rest = self.command()
        self.flags, self.positionals = parse(name, rest)
        for need in ("--project", "--zone")[: 1 if name.startswith("storage") else 2]:
            if need not in self.flags:
                refuse(f"{name}: {need} must be given")
        group, verb = name.rsplit(" ", 1)
        self.call = f"{group.split()[-1]} {verb}"
        self.fault(None)
        getattr(self, self.call.replace("-", "_").replace(" ", "_"))()
        self.save()

    def command(self):
        for name in GRAMMAR["commands"]:
            words = name.split()
            if self.argv[: len(words)] == words:
                return name, self.argv[len(words) :]
        refuse(f"Invalid choice: {' '.join(self.argv)}")

    def save(self):
        (CLOUD / "state.json").write_text(json.dumps(self.state))

    def spared(self, fault):
        fault["after"] = fault.get("after", 0) - 1
        self.save()
        return fault["after"] >= 0

    def fault(self, worker, text=""):
        for fault in self.state.get("faults", []):
            if (
                fault["call"] == self.call
                and fault.get("worker") == worker
                and fault.get("has", "") in (text or " ".join(self.argv))
                and fault.get("times", 1) > 0
                and not self.spared(fault)
            ):
                fault["times"] = fault.get("times", 1) - 1
                self.save()
                print(f"ERROR: {self.call} failed on purpose", file=sys.stderr)
                if worker is None:
                    sys.exit(fault.get("status", 1))
                return fault.get("status", 255)
        return 0

    # --- TPU VMs

    def tpu_vm_create(self):
        if self.state["node"]:
            refuse("already exists", 1)
        self.state["node"] = "READY"
        self.clear()

    def tpu_vm_delete(self):
        self.state["node"] = None

    def tpu_vm_start(self):
        self.state["node"] = "READY"

    def tpu_vm_stop(self):
        if self.state["workers"] > 1:
            refuse("this operation is only available with single TPU nodes", 1)
        self.state["node"] = "STOPPED"

    def tpu_vm_list(self):
        assert self.flags["--format"] == "value(name.basename(),state,networkEndpoints.len())"
        print("other\tREADY\t9")
        if self.state["node"]:
            print(f"tpu-a\t{self.state['node']}\t{self.state['workers']}")

    def tpu_vm_scp(self):
        self.reach()
        *sources, target = self.positionals
        for worker in self.workers():
            if self.fault(worker):
                sys.exit(255)
            for source in sources:
                data = Path(source).read_bytes()
                (CLOUD / f"worker{worker}" / target.split(":", 1)[1]).write_bytes(data)

    def tpu_vm_ssh(self):
        if "--command" not in self.flags:
            refuse("--worker=all needs --command", 1)
        command = self.flags["--command"]
        self.reach()
        if "tpu_worker.sh status" in command:
            self.advance()
            self.reach()
        failed = 0
        for worker in self.workers():
            home = CLOUD / f"worker{worker}"
            env = {
                "HOME": str(home),
                "PATH": f"{CLOUD / 'tools'}:{os.environ['PATH']}",
                "WORKER": str(worker),
                "FAKE_CLOUD": str(CLOUD),
                "LC_ALL": "C.UTF-8",
            }
            status = self.fault(worker, command)
            if not status:
                shell = ["bash", "-c", command]
                status = subprocess.run(shell, cwd=home, env=env, check=False).returncode
            failed = failed or status
        if failed:
            self.save()
            sys.exit(failed)

    def workers(self):
        assert self.flags.get("--worker") == "all", "commands act on all workers"
        return range(self.state["workers"])

    def reach(self):
        if self.state["node"] != "READY":
            self.save()
            refuse(f"the TPU is in state {self.state['node']}", 1)

    def advance(self):
        """The next token of the run that is going on, if one was started."""
        started = len((CLOUD / "started").read_text().splitlines())
        started //= self.state["workers"]
        runs = self.state.get("runs", [])
        tokens = runs[started - 1] if 0 < started <= len(runs) else []
        if not tokens:
            return
        token = tokens.pop(0)
        if token == "preempted":
            self.state["node"] = "PREEMPTED"
            if self.state["request"]:
                self.state["request"] = "SUSPENDED"
            return
        each = token.split("/") if "/" in token else [token] * self.state["workers"]
        for worker, one in enumerate(each):
            unit = CLOUD / f"worker{worker}" / "unit"
            if one == "rebooted":
                unit.unlink()
            else:
                unit.write_text(one)

    def clear(self):
        """New VMs: empty disks, no run."""
        for worker in range(self.state["workers"]):
            subprocess.run(["rm", "-rf", str(CLOUD / f"worker{worker}")], check=True)
            (CLOUD / f"worker{worker}").mkdir()
        (CLOUD / "started").write_text("")

    # --- queued resources

    def queued_resources_create(self):
        if self.state["request"]:
            refuse("already exists", 1)
        grant = self.state["grants"].pop(0)
        self.state["states"], self.state["runs"] = grant["states"], grant.get("runs", [])
        self.state["request"] = "WAITING"

    def queued_resources_delete(self):
        if not self.state["request"]:
            refuse("not found", 1)
        if self.state["node"] and "--force" not in self.flags:
            refuse("has nodes: delete them first, or give --force", 1)
        self.state["request"] = self.state["node"] = None

    def queued_resources_list(self):
        assert self.flags["--format"] == "value(name.basename(),state.state)"
        print("other\tFAILED")
        if self.state["request"] == "WAITING":
            states = self.state["states"]
            state = states.pop(0) if states else "ACTIVE"
            if state in ("FAILED", "ACTIVE"):
                self.state["request"] = state
            if state == "ACTIVE":
                self.state["node"] = "READY"
                self.clear()
            print(f"tpu-a\t{state}")
        elif self.state["request"]:
            print(f"tpu-a\t{self.state['request']}")

    def storage_ls(self):
        if self.positionals != ["gs://bucket"]:
            refuse("not found: 404", 1)


def parse(name, words):
    grammar = GRAMMAR["commands"][name]
    known = grammar["flags"] | GRAMMAR["wide"]
    flags, positionals = {}, []
    for word in words:
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            positionals.append(word)
        elif flag not in known:
            refuse(f"{name}: unrecognized arguments: {word}")
        elif (known[flag] == "value") != bool(equals):
            refuse(f"{name}: argument {flag}: wrong form in {word}")
        else:
            flags[flag] = value
    low, high = grammar["positionals"]
    if not low <= len(positionals) <= high:
        refuse(f"{name}: wrong number of arguments: {positionals}")
    for need in [[n] for n in grammar["required"]] + grammar.get("one_of", []):
        if not any(n in flags for n in need):
            refuse(f"{name}: argument {' or '.join(need)} must be specified")
    return flags, positionals


def refuse(text, status=2):
    print(f"ERROR: (gcloud) {text}", file=sys.stderr)
    sys.exit(status)


PYTHON = '#!/bin/sh\n[ ! -e "$HOME/read-only" ]\n'  # of the workers' environment
TOOLS = {
    "venv-python": PYTHON,
    "hostname": 'echo "t1v-n-w-$WORKER"',
    "sudo": 'exec "$@"',
    "fuser": 'cat "$HOME/holders" 2>/dev/null; rm -f "$HOME/holders"',
    # Units are a file that holds one word, or "failed STATUS".
    "systemctl": """
unit=$HOME/unit
case $1 in
  is-active) grep -q -E '^(running|done)' "$unit" 2>/dev/null ;;
  reset-failed) ! grep -q failed "$unit" 2>/dev/null || rm "$unit" ;;
  stop)
    if grep -q running "$unit" 2>/dev/null; then echo stopped > "$unit"; else rm -f "$unit"; fi ;;
  show)
    state=$(cat "$unit" 2>/dev/null || true)
    load=loaded main=0
    case $state in
      '') load=not-found active=inactive sub=dead ;;
      running) active=active sub=running ;;
      restarting) active=activating sub=auto-restart main=75 ;;
      done) active=active sub=exited ;;
      stopped) active=failed sub=failed main=75 ;;
      failed*) active=failed sub=failed main=${state#failed } ;;
    esac
    [ "$*" = "show ferjax -p SubState" ] || {
      printf 'NRestarts=0\\nExecMainCode=1\\nExecMainStatus=%s\\n' "$main"
      printf 'LoadState=%s\\nActiveState=%s\\n' "$load" "$active"
    }
    printf 'SubState=%s\\n' "$sub" ;;
esac
""",
    "systemd-run": """
printf '%s\\n' "$@" > "$HOME/systemd-run"
echo running > "$HOME/unit"
echo "$WORKER" >> "$FAKE_CLOUD/started"
""",
    "python3": """
printf '%s ' "$@" >> "$HOME/python3.calls"; echo >> "$HOME/python3.calls"
case "$*" in
  "-m uv"*" venv "*) mkdir -p "$HOME/ferjax-venv/bin"
    cp "$FAKE_CLOUD/tools/venv-python" "$HOME/ferjax-venv/bin/python" ;;
esac
""",
}

if __name__ == "__main__":
    Gcloud(sys.argv[1:]).main()
