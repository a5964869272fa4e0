"""Where do adapters in the vision tower pay? One policy a task, six ways to treat the encoder, two places to read it.

    python -m benchmarks.metaworld_vision                 # coffee-pull and push, three training seeds
    python -m benchmarks.metaworld_vision --tune          # the same after choosing each arm's learning rate
    python -m benchmarks.metaworld_vision --ten           # with 10 demonstrations
    python -m benchmarks.metaworld_vision --where         # bottom, middle, top; prompts do not apply to a convolutional net
    python -m benchmarks.metaworld_vision --table

The question of "Lossless adaptation of pretrained vision models" (Sharma et al. 2023, arXiv 2304.06600). With `--tune` each
arm's learning rate is chosen among `RATES` with training seed 0 on tuning seeds, else it is 1e-3; reported runs use seeds 1 to
3 and fresh episodes. All cells of a training seed come before the next seed's, so a run cut short leaves whole seeds.
"""

from __future__ import annotations

from typing import Any

from benchmarks.metaworld_program import arguments, chosen, finish, read, run
from benchmarks.metaworld_rows import (
    ARMS,
    BLOCKS,
    RESULTS,
    TUNE,
    WHOLE,
    Row,
    clone,
    evaluate,
    make_policy,
    paired,
    pooled,
    scores,
    sizes,
    train,
)  # fmt: skip

TASKS = ("coffee-pull-v3", "push-v3")
RATES = (5e-4, 1e-3, 2e-3)
OUT = RESULTS / "metaworld_vision.jsonl"
STAGES = {"bottom": "{1,2}", "middle": "{3,4}", "top": "{5,6}"}


def tuning() -> list[Row]:
    """Every arm at every rate: training seed 0, tuning seeds."""
    return [
        Row(f"tune/{task}/{taps}/{arm}/{rate}", (task,), arm, seed=0, taps=taps, lr=rate, first=TUNE)
        for task in TASKS for taps, arm in cells() for rate in RATES
    ]  # fmt: skip


def cells() -> list[tuple[str, str]]:
    """(taps, arm): the blind and the small net read no tap, so they stand once."""
    return [(t, a) for t in ("last", "mid") for a in ARMS if t == "mid" or a not in ("blind", "scratch")]


def final(lines: list[dict[str, Any]], count: int = 50) -> list[Row]:
    """Three seeds of every cell, each at its own best rate."""

    def best(*cell: str) -> float:
        tried = [x for x in lines if x["name"].startswith("/".join(("tune", *cell, "")))]
        return float(max(tried, key=lambda x: x["success"])["lr"]) if tried else 1e-3

    return [
        Row(
            f"{task}/{taps}/{arm}/{count}/s{seed}", (task,), arm, seed=seed, taps=taps, lr=best(task, taps, arm),
            demonstrations=count,
        )
        for seed in (1, 2, 3) for task in TASKS for taps, arm in cells()
    ]  # fmt: skip


def depths() -> list[Row]:
    """Convolutional adapters in one third of the net, and norm tuning; the last map is read."""
    return [
        Row(f"{task}/last/{arm}/50/s{seed}", (task,), arm, seed=seed, taps="last")
        for seed in (1, 2, 3) for task in TASKS for arm in (*STAGES, "norms")
    ]  # fmt: skip


def at_depth(row: Row) -> dict[str, Any]:
    """`clone` for the arms of `depths`; nothing is cached, since the bottom is adapted too."""
    import mmpeft

    eyes: dict[str, Any] = (
        {f"{BLOCKS}.*.*.bn*": mmpeft.LayerNormTuning()} if row.arm == "norms"
        else {f"{BLOCKS}.{STAGES[row.arm]}.*": mmpeft.ConvAdapter(size=16)}
    )  # fmt: skip
    policy = make_policy(row)
    training = train(row, policy, WHOLE | eyes, cached=False)
    return scores(evaluate(row, policy)) | training | sizes(policy)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row a task, taps and number of demonstrations; a column an arm; LoRA and conv tested against frozen."""
    done = [x for x in lines if not x["name"].startswith("tune/")]
    out = [f"| task, map, demonstrations | {' | '.join(ARMS)} | lora : frozen | conv : frozen |", "|---" * (len(ARMS) + 3) + "|"]
    for key in sorted({(x["tasks"][0], x["taps"], x["demonstrations"]) for x in done}):
        of = {a: [x for x in done if (x["tasks"][0], x["taps"], x["demonstrations"]) == key and x["arm"] == a] for a in ARMS}
        tests = [paired(of[a], of["frozen"]) for a in ("lora", "conv")]
        said = " | ".join(f"{a}:{b} p={p:.2g}" for a, b, p in tests)
        out.append(f"| {', '.join(map(str, key))} | {' | '.join(pooled(of[a]) for a in ARMS)} | {said} |")
    where = sorted({(x["tasks"][0], x["arm"]) for x in done if x["arm"] not in ARMS})
    out += [f"- {t}, {arm}: {pooled([x for x in done if x['tasks'][0] == t and x['arm'] == arm])}" for t, arm in where]
    return "\n".join(out)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ten", action="store_true", help="10 demonstrations instead of 50")
    parser.add_argument("--where", action="store_true", help="adapters in one third of the net, and norm tuning")
    parser.add_argument("--tune", action="store_true", help="first choose each arm's learning rate")
    given = parser.parse_args()
    out = given.out or OUT
    if given.tune and not (given.table or given.prepare):
        run(chosen(tuning(), given), out, processes=given.processes, work=clone)
    rows = depths() if given.where else final(read(out), 10 if given.ten else 50)
    finish(chosen(rows, given), given, out, work=at_depth if given.where else clone, table=table)


if __name__ == "__main__":
    main()
