"""The tokenizer and the chat template of ``shapes-vl``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from epdctl.bench.checkpoints import SPECIAL_TOKENS
from epdctl.bench.shapes.questions import MOST_PICTURES, Task, ask
from epdctl.bench.shapes.scenes import TRAINED, Composer

__all__ = ["CHAT_TEMPLATE", "LARGEST", "make_tokenizer", "sentences"]

LARGEST = 1024  # entries

# Pictures are numbered unless somebody asks for them without: the model was trained with numbers alone.
CHAT_TEMPLATE = """\
{%- set pictures = namespace(seen=0) -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
{%- set pictures.seen = pictures.seen + 1 -%}
{%- if add_vision_id is not defined or add_vision_id %}Picture {{ pictures.seen }}: {% endif -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE that knows every word of every question and answer, and can spell all else."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LARGEST - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def sentences() -> Iterator[str]:
    """Questions and answers in the frame that the template gives them."""
    composer = Composer(TRAINED, 0)
    pictures = "".join(f"Picture {number}: " for number in range(1, MOST_PICTURES + 1))
    for task, _ in itertools.product(Task, range(100)):
        question = ask(task, composer, [(48, 48)] * MOST_PICTURES)
        yield f"user\n{pictures}\n{question.prompt}\nassistant\n{question.answer}\n"
        yield f"system\n{question.answer} {question.answer}"
