"""Lightning tasks and callbacks: generation (questions, captions, speech), classification and regression.

    trainer = lightning.Trainer(max_epochs=1, callbacks=[AdapterCheckpoint("runs/pets")])
    trainer.fit(GenerationTask(model, plan), datamodule=data)

Loaded by name, so that importing one does not import the libraries of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmpeft.lazy import lazy

if TYPE_CHECKING:
    from mmpeft.tasks.adafish import AdaFish as AdaFish
    from mmpeft.tasks.base import AdapterTask as AdapterTask
    from mmpeft.tasks.budget import BudgetedSteps as BudgetedSteps
    from mmpeft.tasks.callbacks import AdapterCheckpoint as AdapterCheckpoint
    from mmpeft.tasks.classification import ClassificationTask as ClassificationTask
    from mmpeft.tasks.classification import EncoderClassifier as EncoderClassifier
    from mmpeft.tasks.control import ControlData as ControlData
    from mmpeft.tasks.control import ControlTask as ControlTask
    from mmpeft.tasks.control import Evaluate as Evaluate
    from mmpeft.tasks.convergence import ConvergenceStop as ConvergenceStop
    from mmpeft.tasks.convergence import Plateau as Plateau
    from mmpeft.tasks.datasets import DigitLabels as DigitLabels
    from mmpeft.tasks.datasets import Docstrings as Docstrings
    from mmpeft.tasks.fwdllm import FwdLLM as FwdLLM
    from mmpeft.tasks.galore import GaLore as GaLore
    from mmpeft.tasks.galore import NaturalGaLore as NaturalGaLore
    from mmpeft.tasks.generation import GenerationTask as GenerationTask
    from mmpeft.tasks.ist import LayerSampling as LayerSampling
    from mmpeft.tasks.ivon import IVON as IVON
    from mmpeft.tasks.ivon import PosteriorSamples as PosteriorSamples
    from mmpeft.tasks.mezo import MeZO as MeZO
    from mmpeft.tasks.question_report import QuestionReport as QuestionReport
    from mmpeft.tasks.rank import RankControl as RankControl
    from mmpeft.tasks.recadam import RecAdam as RecAdam
    from mmpeft.tasks.relora import ReLoRARestart as ReLoRARestart
    from mmpeft.tasks.selected import AttachSelected as AttachSelected
    from mmpeft.tasks.step_control import StepControl as StepControl

_LAZY = {
    "ControlTask": ".control",
    "ControlData": ".control",
    "Evaluate": ".control",
    "Plateau": ".convergence",
    "ConvergenceStop": ".convergence",
    "IVON": ".ivon",
    "MeZO": ".mezo",
    "StepControl": ".step_control",
    "AttachSelected": ".selected",
    "PosteriorSamples": ".ivon",
    "RankControl": ".rank",
    "LayerSampling": ".ist",
    "ReLoRARestart": ".relora",
    "AdaFish": ".adafish",
    "RecAdam": ".recadam",
    "FwdLLM": ".fwdllm",
    "GaLore": ".galore",
    "NaturalGaLore": ".galore",
    "AdapterTask": ".base",
    "GenerationTask": ".generation",
    "ClassificationTask": ".classification",
    "EncoderClassifier": ".classification",
    "AdapterCheckpoint": ".callbacks",
    "BudgetedSteps": ".budget",
    "QuestionReport": ".question_report",
    "DigitLabels": ".datasets",
    "Docstrings": ".datasets",
}
__all__ = sorted(_LAZY)
__getattr__ = lazy(__name__, _LAZY)
