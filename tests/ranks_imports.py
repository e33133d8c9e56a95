"""What the processes of tests/ranks.py have imported when they are forked; nothing is run."""

import peft  # noqa: F401
import torch.distributed  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import PreTrainedTokenizerFast  # noqa: F401

import zoft.models.adapters.attach  # noqa: F401
import zoft.replay.live  # noqa: F401
import zoft.replay.snapshot  # noqa: F401
import zoft.train.build  # noqa: F401
