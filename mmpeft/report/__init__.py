"""One self-contained HTML page of a run: results with intervals, curves, the plan, videos, and how to repeat it.

    mmpeft.report.write("runs/robot")                  # runs/robot/report.html
    mmpeft report runs/robot --open

What lies in the folder decides what the page shows; `sections.py` is the table of its parts and the files they read:

    result.json        success by arm with intervals and paired tests, or accuracy by kind of question; facts, stages
    rollout.json       what `RolloutResult.save` writes, one an arm: episodes, seeds, tasks
    videos/*.mp4       played in the page, the same seed of several arms side by side
    metrics.csv, events.out.tfevents.*    learning curves
    plan.json, adapter.json, *.yaml       what was trained, and with what configuration
    answers.json, answers.png             of a question-answering run
"""

from mmpeft.report.page import write as write
