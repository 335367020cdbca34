"""What roles say of themselves."""

from concurrent.futures import ThreadPoolExecutor

from streamlearn.contract.status import Heartbeat, read_status


def test_two_of_one_role_on_one_home_speak_at_once_and_neither_fails(tmp_path):
    """Several evaluators may serve one home; the last one's words stand, whole."""

    def speak(who):
        heart = Heartbeat(tmp_path, "evaluate", period_s=0)
        for count in range(400):
            heart.beat(who=who, count=count, force=True)
            assert read_status(tmp_path)["evaluate"]["who"] in (0, 1)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(speak, (0, 1)))
    assert read_status(tmp_path)["evaluate"]["count"] == 399 and [p.name for p in (tmp_path / "status").iterdir()] == ["evaluate.json"]
