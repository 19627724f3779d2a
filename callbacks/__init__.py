"""Lightning callbacks: throughput, checks, metrics and predictions of a run."""

import vlpet_lightning  # noqa: F401  # first: its torchvision fix must run before anything imports torchvision
from callbacks.caption_metrics import CaptionMetrics
from callbacks.distributed import Distributed
from callbacks.parameter_count import ParameterCount
from callbacks.predictions import PredictionWriter
from callbacks.preemption import Preemption
from callbacks.throughput import Throughput
from callbacks.video_metrics import VideoMetrics
from callbacks.vqa_metrics import VQAMetrics
from vlpet_lightning.run.protocol_log import ProtocolLog
from vlpet_lightning.run.score_table import ScoreTable

__all__ = [
    "CaptionMetrics",
    "Distributed",
    "ParameterCount",
    "PredictionWriter",
    "Preemption",
    "ProtocolLog",
    "ScoreTable",
    "Throughput",
    "VQAMetrics",
    "VideoMetrics",
]
