"""What processes tell each other, with a second one that has nothing to say."""

import pytest

from ferjax.config import UnreachableError, UserError
from ferjax.engine import processes


@pytest.mark.parametrize("run", [processes.first, processes.once_per_host])
@pytest.mark.parametrize(("kind", "status"), [(UserError, 2), (UnreachableError, 1)])
def test_an_error_keeps_its_exit_status_on_its_way(monkeypatch, run, kind, status):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_gather_text", lambda text: [text, ""])
    monkeypatch.setattr(processes, "hosts", lambda: ["a", "b"])

    def fail():
        raise kind("the bucket is away")

    with pytest.raises(kind, match=r"^the bucket is away$") as caught:
        run(fail)
    assert type(caught.value) is kind
    assert caught.value.status == status


def test_a_workdir_that_is_not_shared_is_refused(monkeypatch, tmp_path):
    """The second process, on another host, finds no file of process 0's in its own directory."""
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    said = []

    def gather(text):
        said.append(text)
        return [text if len(said) == 1 else "", "" if len(said) == 1 else "elsewhere"]

    monkeypatch.setattr(processes, "_gather_text", gather)
    with pytest.raises(UserError, match="not the same directory for process 1 on elsewhere"):
        processes.require_shared(tmp_path / "run")
    assert said[1] == ""  # this one has seen its own file
