"""The tasks: data, frozen backbone and recipe of each. A run's examples and batches follow from its seed alone.

Every task has three disjoint parts: a pool that a seed draws its training examples from, a validation split on which
learning rates and settings are chosen, and a test split on which nothing is ever chosen. Validation and test labels are
clean everywhere.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, one_hot, pad
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from . import assets, pretrain

SPLIT_SEED = 0


NO_LABEL = -100


@dataclass
class Split:
    """Inputs by the name of the model's argument, (n, ...), and labels (n,), or (n, s) with `NO_LABEL` where there is none."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> Split:
        return Split({name: value[chosen] for name, value in self.inputs.items()}, self.labels[chosen])

    @property
    def label_count(self) -> int:
        return int((self.labels != NO_LABEL).sum())

    def halves(self) -> tuple[Split, Split]:
        """Return the first and the second half, with as many of each class in both."""
        first, second = torch.arange(len(self)).tensor_split(2)
        return self[first], self[second]


@dataclass
class Task:
    """One task.

    Args:
        load (`Callable`): () -> training pool, validation and test `Split`.
        build (`Callable`): () -> the frozen backbone with a new head, drawn from torch's global generator.
        head (`str`, *optional*): name of the head, trained in full; None where the backbone's own answers.
        targets (`tuple[str, ...]`): modules that are adapted.
        batch (`int`): examples of a step.
        diagnosed (`bool`): whether the figures of structure are kept (minutes, on a large model).
        steps (`int`): length of a run, which `find` sets.
    """

    load: Callable[[], tuple[Split, Split, Split]]
    build: Callable[[], nn.Module]
    head: str | None = "classifier"
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    batch: int = 8
    diagnosed: bool = True
    steps: int = 0

    def training_examples(self, count: int, seed: int) -> Split:
        """Return `count` examples of the pool, as many of each class as can be."""
        pool, _, _ = self.load()
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        labels = pool.labels[order]
        if labels.dim() > 1:
            return pool[order[:count]]
        # An example's place within its class; taking the lowest places balances the classes.
        place = one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
        return pool[order[place.argsort(stable=True)[:count]]]

    def batches(self, count: int, seed: int) -> list[Tensor]:
        """Return indices of each step's examples: epochs in random order, one after the other."""
        generator = torch.Generator().manual_seed(seed + 1_000_000)
        epochs = -(-self.steps * self.batch // count)
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
        return list(order[: self.steps * self.batch].split(self.batch))


def _shares(inputs: dict[str, Tensor], labels: Tensor, *sizes: int) -> tuple[Split, ...]:
    """Disjoint random parts of these sizes; -1 in the last place takes the rest. Held-out texts are sorted by length."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    sizes = [size if size >= 0 else len(labels) - sum(sizes[:-1]) for size in sizes]
    parts = order[: sum(sizes)].split(sizes)
    if "attention_mask" in inputs:  # short ones together: less padding to compute
        lengths = inputs["attention_mask"].sum(1)
        parts = [part if i == 0 else part[lengths[part].argsort(stable=True)] for i, part in enumerate(parts)]
    return tuple(Split(inputs, labels)[part] for part in parts)


@functools.cache
def _digits() -> tuple[Split, Split, Split]:
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().view(-1, 1, 8, 8) * (255 / 16)
    pixels = pretrain.to_pixels(interpolate(images, size=28, mode="bilinear")[:, 0])
    return _shares({"pixel_values": pixels}, torch.from_numpy(labels), 500, 400, -1)


@functools.cache
def _fashion() -> tuple[Split, Split, Split]:
    data = assets.fashion()
    # The backbone has seen the training images of six classes; everything here is from the 10 000 test images.
    pixels, labels = pretrain.to_pixels(data["test_x"]), torch.from_numpy(data["test_y"].astype(int))
    return _shares({"pixel_values": pixels}, labels, 4000, 500, 1000)


def vit() -> nn.Module:
    """The ViT that the suite itself has trained, with a new head for ten classes."""
    model = pretrain.build(10)
    missing, unexpected = model.load_state_dict(pretrain.backbone(), strict=False)
    assert not unexpected and all(name.startswith("classifier.") for name in missing)
    return model


@functools.cache
def _tokenizer():
    return AutoTokenizer.from_pretrained(assets.minilm())


def _encoded(found: list[tuple[str, int]], tested: int) -> tuple[Split, Split, Split]:
    encoded = _tokenizer()(
        [text for text, _ in found],
        truncation=True,
        max_length=MiniLM.longest,
        padding=True,
        return_tensors="pt",
    )
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return _shares(inputs, torch.tensor([label for _, label in found]), 1000, 250, tested)


@functools.cache
def _sentences(kind: str) -> tuple[Split, Split, Split]:
    return _encoded(assets.sentences(kind), 500)


SYLLABLES = 5  # and more


@functools.cache
def _words() -> tuple[Split, Split, Split]:
    """Words, letter by letter, and how many vowels are spoken in them, less one; as many of each number."""
    by_label: list[list[tuple[str, int]]] = [[] for _ in range(SYLLABLES)]
    for word, phonemes in assets.pronunciations().items():
        if len(word) + 2 <= MiniLM.longest and (vowels := sum(p[-1].isdigit() for p in phonemes)):
            by_label[min(vowels, SYLLABLES) - 1].append((" ".join(word), min(vowels, SYLLABLES) - 1))
    chooser = random.Random(SPLIT_SEED)
    return _encoded([found for same in by_label for found in chooser.sample(same, 650)], 2000)


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2 with mean pooling, as it was trained, and a linear head on the unit-length embedding's scale."""

    longest = 24  # tokens; longer sentences are cut

    def __init__(self, classes: int = 2):
        super().__init__()
        self.body = AutoModel.from_pretrained(assets.minilm(), add_pooling_layer=False)
        self.classifier = nn.Linear(self.body.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None):
        longest = int(attention_mask.sum(1).max())
        input_ids, attention_mask = input_ids[:, :longest], attention_mask[:, :longest]
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        logits = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


LONGEST = 120  # characters of a sentence that the chat model reads


@functools.cache
def rated_prompts(kind: str) -> list[tuple[str, str]]:
    """Prompts that ask the chat model for the sentiment of a sentence, with the answer, in an order drawn once."""
    found = [
        (f"Review: {sentence}\nSentiment:", " positive" if label else " negative")
        for sentence, label in assets.sentences(kind)
        if len(sentence) <= LONGEST
    ]
    random.Random(SPLIT_SEED).shuffle(found)
    return found


ANSWERS = (" negative", " positive")  # by label


@functools.cache
def _reviews() -> tuple[Split, Split, Split]:
    found = rated_prompts("movie")[:1450]
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm(), padding_side="left")
    encoded = tokenizer([prompt for prompt, _ in found], padding=True, return_tensors="pt")
    labels = torch.tensor([ANSWERS.index(answer) for _, answer in found])
    whole = Split({name: encoded[name] for name in ("input_ids", "attention_mask")}, labels)
    parts = [whole[part] for part in torch.arange(len(labels)).split([1000, 50, 400])]
    # Held-out sentences by length: less padding to compute.
    return (
        parts[0],
        *(part[part.inputs["attention_mask"].sum(1).argsort(stable=True)] for part in parts[1:]),
    )


def _answer_ids() -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm())
    return [tokenizer(answer).input_ids[0] for answer in ANSWERS]


class Phonemes(NamedTuple):
    """Words with their phonemes, token by token.

    Args:
        splits (`tuple[Split, ...]`): prompts with all but the last token of the answer, padded on the left, and labels
            (n, longest answer), which end where the answers end.
        tokens (`list[int]`): of the answers, by label.
        longest (`int`): tokens of an answer.
    """

    splits: tuple[Split, Split, Split]
    tokens: list[int]
    longest: int


@functools.cache
def _phonemes() -> Phonemes:
    """How words are pronounced, without stress: 'Word: l e t t e r' -> ' L EH T ER'."""
    known = assets.pronunciations()
    words = random.Random(SPLIT_SEED).sample([word for word in known if 3 <= len(word) <= 10], 1300)
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm())
    prompts = [tokenizer(f"Word: {' '.join(word)}\nPhonemes:").input_ids for word in words]
    spoken = [" " + " ".join(phoneme.rstrip("012") for phoneme in known[word]) for word in words]
    answers = [[*tokenizer(answer).input_ids, tokenizer.eos_token_id] for answer in spoken]
    tokens = sorted({token for answer in answers for token in answer})
    inputs = [torch.tensor([*prompt, *answer[:-1]]) for prompt, answer in zip(prompts, answers, strict=True)]
    labels = [torch.tensor([tokens.index(token) for token in answer]) for answer in answers]
    split = Split(
        {
            "input_ids": _left_padded(inputs, tokenizer.eos_token_id),
            "attention_mask": _left_padded([torch.ones_like(ids) for ids in inputs], 0),
        },
        _left_padded(labels, NO_LABEL),
    )
    parts = tuple(split[part] for part in torch.arange(len(words)).split([1000, 100, 200]))
    return Phonemes(parts, tokens, split.labels.shape[1])


def _left_padded(rows: list[Tensor], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.stack([pad(row, (longest - len(row), 0), value=value) for row in rows])


class SmolLM(nn.Module):
    """SmolLM2-135M-Instruct that answers with some tokens alone. The loss is of these among all tokens.

    Args:
        answers (`list[int]`): ids of the tokens, by label.
        longest (`int`): tokens of an answer, which the input ends with; logits are (n, classes) where it is 1, else
            (n, longest, classes).
    """

    def __init__(self, answers: list[int], longest: int = 1):
        super().__init__()
        self.body = AutoModelForCausalLM.from_pretrained(assets.smollm(), dtype=torch.float32)
        self.register_buffer("answers", torch.tensor(answers))
        self.longest = longest

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None):
        width = int(attention_mask.sum(1).max())  # padded on the left
        input_ids, attention_mask = input_ids[:, -width:], attention_mask[:, -width:]
        logits = self.body(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_to_keep=self.longest,
            use_cache=False,
        ).logits
        logits = logits[:, -1] if self.longest == 1 else logits
        loss = None
        if labels is not None:
            counts = labels != NO_LABEL
            loss = cross_entropy(logits[counts], self.answers[labels[counts]])
        return SequenceClassifierOutput(loss=loss, logits=logits[..., self.answers])


# Every linear module of a block.
_VIT_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
_MINILM_LINEAR = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
CHAT_LINEAR = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj")


TASKS = {
    # Handwritten digits, ViT pre-trained on six classes of clothes.
    "digits-all": Task(
        _digits,
        vit,
        targets=_VIT_LINEAR,
        batch=32,
    ),
    # All ten classes of Fashion-MNIST, four of them new, same ViT.
    "fashion-all": Task(
        _fashion,
        vit,
        targets=_VIT_LINEAR,
        batch=16,
    ),
    # Sentiment of film-review sentences, MiniLM.
    "movie-all": Task(
        functools.partial(_sentences, "movie"),
        MiniLM,
        targets=_MINILM_LINEAR,
    ),
    # Syllables of a word, spelled letter by letter, MiniLM.
    "words-all": Task(
        _words,
        functools.partial(MiniLM, SYLLABLES),
        targets=_MINILM_LINEAR,
    ),
    # Sentiment of film-review sentences, SmolLM2-135M-Instruct.
    "smollm-reviews": Task(
        _reviews,
        lambda: SmolLM(_answer_ids()),
        head=None,
        targets=CHAT_LINEAR,
        diagnosed=False,
    ),
    # Phonemes of a word, written out, SmolLM2-135M-Instruct; accuracy of each token given those before.
    "smollm-phonemes": Task(
        lambda: _phonemes().splits,
        lambda: SmolLM(_phonemes().tokens, _phonemes().longest),
        head=None,
        targets=CHAT_LINEAR,
        diagnosed=False,
    ),
}


def find(name: str, examples: int) -> Task:
    """Return the task of a name such as 'digits-all@15', with the steps of so many epochs over its examples."""
    base, _, epochs = name.partition("@")
    task = TASKS[base]
    return replace(task, steps=max(1, round(int(epochs) * examples / task.batch)))
