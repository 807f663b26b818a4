"""tpu_queued.sh against a gcloud that plays a story."""

import pytest
from cloud_harness import PLACE


def test_queued_waits_runs_and_deletes(cloud):
    states = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"]
    cloud.story(grants=[{"states": states, "runs": [["running", "running", "done"]]}])
    done = cloud.queued()
    assert done.returncode == 0, done
    assert cloud.verbs() == [
        *["queued create", "scp", "ssh setup", "ssh check", "ssh run", "ssh logs", "queued delete"]
    ]
    assert cloud.state["request"] is None


def test_queued_goes_on_after_preemption_with_the_same_command(cloud):
    cloud.story(
        grants=[
            {"states": [], "runs": [["running", "preempted"]]},
            {"states": ["WAITING_FOR_RESOURCES"], "runs": [["running", "done"]]},
        ]
    )
    done = cloud.queued("--keep")
    assert done.returncode == 0, done
    one = ["queued create", "scp", "ssh setup", "ssh check", "ssh run"]
    assert cloud.verbs() == [*one, "queued delete", *one]
    runs = [c for c in cloud.calls() if "tpu_worker.sh run" in " ".join(c)]
    assert runs[0] == runs[1]
    assert cloud.state["request"] == "ACTIVE"  # --keep


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_queued_deletes_what_it_finds_dead_first(cloud, state):
    cloud.story(request=state, grants=[{"states": [], "runs": [["done"]]}])
    assert cloud.queued().returncode == 0
    assert cloud.verbs()[:2] == ["queued delete", "queued create"]


def test_queued_goes_on_with_what_it_finds_running(cloud):
    cloud.story(node="READY", runs=[["running", "done"]])
    cloud.going()
    before = len(cloud.verbs())
    state = cloud.state
    cloud.story(**{**state, "request": "ACTIVE"})
    assert cloud.queued().returncode == 0
    assert cloud.verbs()[before:] == ["ssh logs", "queued delete"]


def test_queued_gives_up_on_a_request_that_always_fails(cloud):
    cloud.story(grants=[{"states": ["FAILED"]}] * 5)
    done = cloud.queued("--max-refusals=2")
    assert done.returncode == 1
    assert cloud.verbs() == ["queued create", "queued delete"] * 2


def test_queued_ends_when_create_fails(cloud):
    cloud.story(grants=[], faults=[{"call": "queued-resources create"}])
    assert cloud.queued().returncode == 1
    assert cloud.verbs() == ["queued create"]


@pytest.mark.parametrize("call", ["create", "delete"])
def test_queued_asks_again_after_a_preemption_although_gcloud_fails_once(cloud, call):
    fault = {"call": f"queued-resources {call}", "after": int(call == "create")}
    grants = [
        {"states": [], "runs": [["running", "preempted"]]},
        {"states": [], "runs": [["running", "done"]]},
    ]
    cloud.story(grants=grants, faults=[fault])
    done = cloud.queued()
    assert done.returncode == 0, done
    assert cloud.verbs().count("ssh run") == 2
    assert cloud.verbs().count(f"queued {call}") == 3


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_queued_says_what_could_not_be_deleted(cloud, state):
    fault = {"call": "queued-resources delete", "times": 99}
    cloud.story(request=state, faults=[fault])
    done = cloud.queued("--max-refusals=2")
    assert done.returncode == 1
    assert "could not be deleted: it may still cost money" in done.stderr
    assert cloud.verbs() == ["queued delete"] * 2


def test_queued_restarts_a_run_that_fails_some_times(cloud):
    runs = [["failed 134/running"], ["running", "rebooted/running"], ["done"]]
    cloud.story(grants=[{"states": [], "runs": runs}])
    done = cloud.queued()
    assert done.returncode == 0, done
    again = ["ssh stop", "ssh check", "ssh run"]
    first = ["queued create", "scp", "ssh setup", "ssh check", "ssh run"]
    assert cloud.verbs() == [*first, *again, *again, "ssh logs", "queued delete"]


def test_queued_gives_up_after_max_failures_and_deletes(cloud):
    cloud.story(grants=[{"states": [], "runs": [["failed 1"]] * 9}])
    done = cloud.queued("--max-failures=1")
    assert done.returncode == 1
    assert cloud.verbs().count("ssh run") == 2
    assert cloud.verbs()[-2:] == ["ssh logs", "queued delete"]


@pytest.mark.parametrize(("token", "status"), [("failed 2", 2), ("stopped", 75)])
def test_queued_does_not_repeat_what_is_wrong_or_was_stopped(cloud, token, status):
    cloud.story(grants=[{"states": [], "runs": [["running", token]]}])
    assert cloud.queued().returncode == status
    assert cloud.verbs().count("ssh run") == 1
    assert cloud.verbs()[-1] == "queued delete"


def test_queued_bears_gcloud_failing_now_and_then(cloud):
    faults = [
        {"call": "queued-resources list", "times": 2},
        {"call": "tpu-vm list", "times": 1},
        {"call": "tpu-vm ssh", "has": "tpu_worker.sh status", "worker": 1, "times": 3},
    ]
    cloud.story(grants=[{"states": [], "runs": [["running"] * 9 + ["done"]]}], faults=faults)
    done = cloud.queued()
    assert done.returncode == 0, done
    assert cloud.verbs().count("ssh run") == 1


def test_queued_leaves_a_tpu_whose_workers_stay_silent(cloud):
    fault = {"call": "tpu-vm ssh", "has": "tpu_worker.sh status", "worker": 1, "times": 99}
    cloud.story(grants=[{"states": []}], faults=[fault])
    done = cloud.queued()
    assert done.returncode == 1
    assert "costs money" in done.stderr
    assert cloud.verbs() == ["queued create"]


def test_queued_status_and_delete(cloud):
    cloud.story(request="SUSPENDED")
    done = cloud.run("tpu_queued.sh", "status", *PLACE)
    assert (done.returncode, done.stdout) == (5, "request SUSPENDED\n")
    assert cloud.run("tpu_queued.sh", "delete", *PLACE).returncode == 0
    assert cloud.state["request"] is None
    assert cloud.run("tpu_queued.sh", "delete", *PLACE).returncode == 0  # nothing left to delete


@pytest.mark.parametrize("before", ["stopped", "done", "failed 2"])
def test_queued_starts_the_run_whatever_an_earlier_one_said(cloud, before):
    cloud.story(node="READY", request="ACTIVE", runs=[[before, before], ["running", "done"]])
    cloud.going()
    already = len(cloud.verbs())
    assert cloud.queued("--keep").returncode == 0
    assert cloud.verbs()[already:] == ["scp", "ssh setup", "ssh check", "ssh run"]


def test_queued_gives_up_when_it_cannot_be_started(cloud):
    fault = {"call": "tpu-vm ssh", "has": "tpu_worker.sh setup", "worker": 1, "times": 99}
    cloud.story(grants=[{"states": []}], faults=[fault])
    assert cloud.queued("--max-failures=1").returncode == 1
    assert cloud.verbs()[1:-2] == ["scp", "ssh setup"] * 2
    assert cloud.verbs()[-1] == "queued delete"
