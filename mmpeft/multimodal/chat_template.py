"""Messages to one string with known boundaries: which characters come from which message, and where each turn ends.

The tokenizer's own chat template is rendered, never imitated. Choices made here:

- To learn where a message's content lands, the template is rendered a second time with the content between two
  noncharacters (U+FDD0, U+FDD1). What lies between them is content, everything else is the template's. Templates that
  drop or rewrite content are refused by name; templates that trim it are followed.
- The prompt for generation is the rendered conversation up to the point where an answer would begin, so the tokens
  before an answer are the same in training and in generation, whatever the template adds there.
- An assistant turn ends with a control token of the template (`<|im_end|>`, `</s>`): that token is trained and stops
  generation. A template without one is refused, because a model trained on it would never stop.
- A tokenizer without a template (GPT-2) gets "plain"; "chatml" is there for who wants no default system prompt.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmpeft.errors import BadSample, ConfigError, Unsupported, nearest

logger = logging.getLogger(__name__)

OPEN, CLOSE, MEDIA = "\ufdd0", "\ufdd1", "\ufdd2"  # Unicode noncharacters: never part of text
CONTENT = re.compile(f"{OPEN}([^{CLOSE}]*){CLOSE}")

TEMPLATES: dict[str, str] = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
        "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ),
}


@dataclass(frozen=True)
class Turn:
    """One message as text: `MEDIA` characters stand where media are; `supervised` turns are trained on."""

    role: str
    content: str
    supervised: bool = False


@dataclass(frozen=True)
class Piece:
    """A stretch of the rendered conversation: the content of `turn`, or (None) the template's own text."""

    text: str
    turn: Turn | None


class ChatTemplate:
    """A tokenizer's chat template with its system prompt choice and its end-of-turn token.

    Args:
        tokenizer: a transformers tokenizer.
        template: None = the tokenizer's own ("plain" if it has none), a name of `TEMPLATES`, or Jinja text.
        system_prompt: None = as the template does by itself (some insert one); a string, "" included, is put in front
            of every conversation that has no system message of its own.

    Attributes:
        end_of_turn: the control token that closes an assistant turn, such as "<|im_end|>".
        control_tokens: the tokens that structure a chat; text that holds one is refused.

    Raises:
        ConfigError: an unknown template name, or a template that ends no assistant turn with a token of this tokenizer.
        BadSample: a template that does not render a plain question and answer.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, system_prompt: str | None = None) -> None:
        if template is None and not tokenizer.chat_template:
            logger.info("the tokenizer has no chat template: mmpeft's 'plain' template is used")
            template = "plain"
        if template is not None and template not in TEMPLATES and "{" not in template:
            raise ConfigError(
                f"unknown chat template {template!r}; valid: {', '.join(TEMPLATES)}, Jinja text, or None for the "
                f"tokenizer's own{nearest(template, TEMPLATES)}"
            )
        self.tokenizer = tokenizer
        self.template: str | None = None if template is None else TEMPLATES.get(template, template)
        self.system_prompt = system_prompt
        self.control_tokens = _control_tokens(tokenizer, str(self.template or tokenizer.chat_template))
        self.end_of_turn = self._find_end_of_turn()

    def render(self, turns: Sequence[Turn], *, generation: bool, where: str) -> list[Piece]:
        """Render turns to pieces whose texts, joined, are what the model reads.

        Args:
            generation: end where the next assistant's answer would begin.
            where: the sample's name, for messages.

        Raises:
            BadSample: the template refuses these turns (roles that do not alternate, no system role).
            Unsupported: the template drops or rewrites a content, so its characters cannot be told apart.
        """
        turns = list(turns)
        if self.system_prompt is not None and (not turns or turns[0].role != "system"):
            turns.insert(0, Turn("system", self.system_prompt))
        if generation:
            turns.append(Turn("assistant", "x"))  # stands for the answer, cut off below
        plain = self._apply([(t.role, t.content) for t in turns], where)
        marked = self._apply([(t.role, OPEN + t.content + CLOSE) for t in turns], where)
        literals = CONTENT.split(marked)[::2]  # the template's text before, between and after the contents
        if CONTENT.findall(marked) != [t.content for t in turns]:
            raise Unsupported(
                f"{where}: the chat template drops, repeats or rewrites messages; give another chat_template="
            )
        pieces: list[Piece] = []
        rest = plain
        for turn, before, after in zip(turns, literals[:-1], literals[1:], strict=True):
            used = next((c for c in _trimmings(turn.content) if rest.startswith(before + c + after)), None)
            if used is None:
                raise Unsupported(
                    f"{where}: the chat template rewrites the {turn.role} message {turn.content[:40]!r}; give another "
                    "chat_template="
                )
            pieces += [Piece(before, None), Piece(used, turn)]
            rest = rest[len(before) + len(used) :]
        return pieces[:-1] if generation else [*pieces, Piece(rest, None)]

    def _apply(self, messages: Sequence[tuple[str, str]], where: str) -> str:
        from jinja2 import TemplateError

        dicts = [{"role": role, "content": content} for role, content in messages]
        try:
            return str(self.tokenizer.apply_chat_template(dicts, tokenize=False, chat_template=self.template))
        except (TemplateError, TypeError) as error:
            roles = ", ".join(role for role, _ in messages)
            raise BadSample(f"{where}: the chat template refuses the turns ({roles}): {error}") from error

    def _find_end_of_turn(self) -> str:
        probe = [Turn("user", "x"), Turn("assistant", "x")]
        tail = self.render(probe, generation=False, where="a question and an answer")[-1].text
        token = next((t for t in self.control_tokens if tail.lstrip().startswith(t)), None)
        if token is None:
            raise ConfigError(
                f"the chat template ends an assistant turn with {tail!r}, which begins with no special token of the "
                f"tokenizer, so a trained model would never stop; give another chat_template= ({', '.join(TEMPLATES)})"
            )
        return token


def _trimmings(content: str) -> Iterator[str]:
    """The forms in which templates copy a content: as it is, or trimmed at one end or both."""
    yield from (content, content.strip(), content.rstrip(), content.lstrip(), content.lstrip("\n"), content.strip("\n"))


def _control_tokens(tokenizer: Any, template: str) -> list[str]:
    """Special tokens, and added tokens that the template writes, longest first."""
    added = tokenizer.added_tokens_decoder.values()
    named = {t.content for t in added if t.special or (t.content.strip() and t.content in template)}
    return sorted(named | set(tokenizer.all_special_tokens), key=lambda t: (-len(t), t))
