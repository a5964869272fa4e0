"""A trial's numbers are those of its two evaluations, the clone's is played before practice, and its files hold them."""

import csv
import json

import pytest

from mmpeft.errors import ConfigError
from mmpeft.policies.ppo_loop import PPOResult
from mmpeft.policies.ppo_trial import before_and_after, print_row
from mmpeft.policies.rollout_result import RolloutResult

CURVE = [{"iteration": 0.0, "steps": 40.0, "success": 0.25}, {"iteration": 1.0, "steps": 81.0, "success": 0.5}]


def played(won, of=10, first=70_000):
    rows = [{"task": "toy", "seed": first + i, "success": i in won, "steps": 3} for i in range(of)]
    return RolloutResult(rows)


def trial(evaluations, **options):
    """Both evaluations in turn, and the order in which things were done."""
    done, left = [], iter(evaluations)

    def evaluate():
        done.append("evaluate")
        return next(left)

    def practise():
        done.append("practise")
        return PPOResult(None, None, CURVE, 81, 1.0, "ppo")

    return before_and_after(evaluate, practise, arguments={"seed": 3}, began=0.0, **options), done


def test_the_clone_is_played_before_it_practises(capsys):
    before, after = played({0, 1}), played({1, 2, 3, 4, 5, 6, 7})
    result, done = trial([before, after])
    assert done == ["evaluate", "practise", "evaluate"]
    assert (result["clone"], result["ppo"], result["episodes"], result["steps"]) == (0.2, 0.7, 10, 81)
    assert (result["only_ppo"], result["only_clone"]) == (6, 1)
    assert result["p_value"] == pytest.approx(0.125)  # 1 or fewer of 7 fair coins, both tails: 2 * (1 + 7) / 2^7
    assert capsys.readouterr().out == "clone   0.20 (0.06 to 0.51)\nPPO     0.70 (0.40 to 0.89), p = 0.12\n"


def test_result_and_curve_are_written_side_by_side(tmp_path):
    output = tmp_path / "deep" / "result.json"
    result, _ = trial([played({0}), played({0, 4})], output=output)
    read = json.loads(output.read_text())
    assert read == json.loads(json.dumps(result)) and read["arguments"] == {"seed": 3}
    with output.with_suffix(".csv").open() as file:
        assert [float(r["steps"]) for r in csv.DictReader(file)] == [40, 81]
    assert sorted(p.name for p in output.parent.iterdir()) == ["result.csv", "result.json"]


def test_other_episodes_cannot_be_compared(tmp_path):
    with pytest.raises(ConfigError, match="the same episodes on both sides"):
        trial([played({0}), played({0}, first=70_001)], output=tmp_path / "result.json")
    assert not list(tmp_path.iterdir())


def test_a_row_is_one_line(capsys):
    print_row({"steps": 81.0, "kl": 0.0123456, "return": float("nan")})
    assert capsys.readouterr().out == "steps 81 kl 0.01235 return nan\n"
