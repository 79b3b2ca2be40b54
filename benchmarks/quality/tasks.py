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

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from . import assets, pretrain

SPLIT_SEED = 0


@dataclass
class Split:
    """Inputs by the name of the model's argument, (n, ...), and labels (n,)."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> Split:
        return Split({name: value[chosen] for name, value in self.inputs.items()}, self.labels[chosen])


@dataclass
class Task:
    """One task.

    Args:
        summary (`str`): what is learned, for the report.
        load (`Callable`): () -> training pool, validation and test `Split`.
        build (`Callable`): () -> the frozen backbone with a new head, drawn from torch's global generator.
        head (`str`, *optional*): name of the head, trained in full; None where the backbone's own answers.
        targets (`tuple[str, ...]`): modules that are adapted.
        steps (`int`), batch (`int`): length of a run: where twice as long no longer raises LoRA's validation accuracy by more
            than noise.
        noise (`float`): share of training labels replaced by random ones.
        diagnosed (`bool`): whether the figures of structure are kept (minutes, on a large model).
    """

    summary: str
    load: Callable[[], tuple[Split, Split, Split]]
    build: Callable[[], nn.Module]
    head: str | None = "classifier"
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    steps: int = 150
    batch: int = 16
    noise: float = 0.0
    diagnosed: bool = True

    def training_examples(self, count: int, seed: int) -> Split:
        """`count` examples of the pool, as many of each class as can be, with this task's share of random labels."""
        pool, _, _ = self.load()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(pool), generator=generator)
        labels = pool.labels[order]
        # An example's place within its class; taking the lowest places balances the classes.
        one_hot = torch.nn.functional.one_hot(labels)
        place = one_hot.cumsum(0).gather(1, labels[:, None])[:, 0]
        chosen = pool[order[place.argsort(stable=True)[:count]]]
        noisy = torch.rand(count, generator=generator) < self.noise
        other = torch.randint(int(pool.labels.max()) + 1, (count,), generator=generator)
        chosen.labels = torch.where(noisy, other, chosen.labels)
        return chosen

    def batches(self, count: int, seed: int) -> list[Tensor]:
        """Indices of each step's examples: epochs in random order, one after the other."""
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


def _text(kind: str, summary: str, targets: tuple[str, ...] = ("query", "value")) -> Task:
    load = functools.partial(_sentences, kind)
    return Task(summary, load, MiniLM, targets=targets, steps=60, batch=8)


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


@functools.cache
def _reviews(tested: int = 400) -> tuple[Split, Split, Split]:
    found = rated_prompts("movie")[: 1050 + tested]
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm(), padding_side="left")
    encoded = tokenizer([prompt for prompt, _ in found], padding=True, return_tensors="pt")
    labels = torch.tensor([ANSWERS.index(answer) for _, answer in found])
    whole = Split({name: encoded[name] for name in ("input_ids", "attention_mask")}, labels)
    parts = [whole[part] for part in torch.arange(len(labels)).split([1000, 50, tested])]
    # Held-out sentences by length: less padding to compute.
    return (
        parts[0],
        *(part[part.inputs["attention_mask"].sum(1).argsort(stable=True)] for part in parts[1:]),
    )


ANSWERS = (" negative", " positive")  # by label


class SmolLM(nn.Module):
    """SmolLM2-135M-Instruct that answers with one of two words. The loss is of this word among all words."""

    def __init__(self, classes: int = 2):
        super().__init__()
        self.body = AutoModelForCausalLM.from_pretrained(assets.smollm(), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(assets.smollm())
        self.register_buffer("answers", torch.tensor([tokenizer(answer).input_ids[0] for answer in ANSWERS]))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None):
        longest = int(attention_mask.sum(1).max())  # padded on the left
        input_ids, attention_mask = input_ids[:, -longest:], attention_mask[:, -longest:]
        logits = self.body(
            input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=1, use_cache=False
        ).logits[:, -1]
        loss = None if labels is None else cross_entropy(logits, self.answers[labels])
        return SequenceClassifierOutput(loss=loss, logits=logits[:, self.answers])


# Every linear module of a block.
_VIT_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
CHAT_LINEAR = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj")


def _chat(summary: str, load: Callable[[], tuple[Split, Split, Split]]) -> Task:
    return Task(summary, load, SmolLM, head=None, targets=CHAT_LINEAR, steps=40, batch=8, diagnosed=False)


_MINILM_LINEAR = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


TASKS = {
    "digits": Task(
        "handwritten digits, ViT pre-trained on six classes of clothes", _digits, vit, steps=200, batch=32
    ),
    "fashion": Task("all ten classes of Fashion-MNIST, four of them new, same ViT", _fashion, vit),
    "fashion-long": Task("the same for four times as many steps", _fashion, vit, steps=600),
    "noisy-fashion": Task("all ten classes with 40 % of training labels random", _fashion, vit, noise=0.4),
    "movie": _text("movie", "sentiment of film-review sentences, MiniLM"),
    "tweet": _text("tweet", "sentiment of tweets, MiniLM"),
    "product": _text("product", "sentiment of product-review sentences, MiniLM"),
    "digits-all": Task(
        "digits, all linear modules adapted", _digits, vit, targets=_VIT_LINEAR, steps=200, batch=32
    ),
    "fashion-all": Task("all ten classes, all linear modules adapted", _fashion, vit, targets=_VIT_LINEAR),
    "smollm-reviews": _chat(
        "sentiment of film-review sentences, SmolLM2-135M-Instruct in a plain loop, all linear modules adapted",
        _reviews,
    ),
    "smollm-reviews-large": _chat("the same, tested on 2,000 sentences", functools.partial(_reviews, 2000)),
    "movie-all": _text("movie", "film reviews, MiniLM, all linear modules adapted", _MINILM_LINEAR),
    "words-all": Task(
        "syllables of a word, spelled letter by letter, MiniLM, all linear modules adapted",
        _words,
        functools.partial(MiniLM, SYLLABLES),
        targets=_MINILM_LINEAR,
        steps=60,
        batch=8,
    ),
    "product-all": _text("product", "product reviews, MiniLM, all linear modules adapted", _MINILM_LINEAR),
}

AT_PASSES = "@"  # digits-all@15: the task in 15 passes over its examples


def base_of(name: str) -> str:
    """The task's name without its passes."""
    return name.partition(AT_PASSES)[0]


def steps_of(name: str, examples: int, batch: int, otherwise: int) -> int:
    """Length of a run, which the passes in the task's name say, where it has some."""
    passes = name.partition(AT_PASSES)[2]
    return round(int(passes) * examples / batch) if passes else otherwise


def passes_of(name: str, examples: int) -> float:
    """Passes of a run over its examples: those in the task's name, or what its steps make."""
    passes, task = name.partition(AT_PASSES)[2], TASKS[base_of(name)]
    return float(passes) if passes else task.steps * task.batch / examples


def find(name: str, examples: int) -> Task:
    """The task of that name, as long as it says."""
    task = TASKS[base_of(name)]
    return replace(task, steps=steps_of(name, examples, task.batch, task.steps))
