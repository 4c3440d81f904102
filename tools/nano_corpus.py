"""The text that the bundled nano model is pretrained on: written or generated here, nothing copied.

Hand-written files stand in `tools/corpus/`; everything else is generated from the tables in its `world.toml` with a
seed. Documents are small: chats in Phi's format about an invented world, passages with questions about them, lists,
commands and plain prose. The tables know synonyms and each question is asked in many shapes, so that a model has to
find the words that matter; most answers are random, so that it has to read them from what came before. None of it is
about philora or fine-tuning: technical words occur as words only, which gives each of them an embedding that an
adapter can use.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

CORPUS_DIR = Path(__file__).parent / "corpus"
SEED = 20240501


@dataclass(frozen=True)
class Domain:
    """A corner of the invented world: what people do there, to what, with what and where."""

    verbs: list[list[str]]
    nouns: list[list[str]]
    tools: list[str]
    places: list[str]


def _synonyms(entries: list[str]) -> list[list[str]]:
    """Read ["a|b", "c"] as [[a, b], [c]]."""
    return [entry.split("|") for entry in entries]


_WORLD = tomllib.loads((CORPUS_DIR / "world.toml").read_text(encoding="utf-8"))
DOMAINS = {
    name: Domain(_synonyms(entry["verbs"]), _synonyms(entry["nouns"]), entry["tools"], entry["places"])
    for name, entry in _WORLD["domains"].items()
}
SHAPES: dict[str, list[str]] = _WORLD["shapes"]
PROBLEMS, ATTRIBUTES = _synonyms(_WORLD["problems"]), _synonyms(_WORLD["attributes"])
CAUSES: list[str] = _WORLD["causes"]
QUALIFIERS: list[str] = _WORLD["qualifiers"]
NAMES: list[str] = _WORLD["names"]
COLOURS: list[str] = _WORLD["colours"]
ADJECTIVES: list[str] = _WORLD["adjectives"]
ADVERBS: list[str] = _WORLD["adverbs"]
DAYS: list[str] = _WORLD["days"]
MONTHS: list[str] = _WORLD["months"]
UNITS: list[str] = _WORLD["units"]
EXTENSIONS: list[str] = _WORLD["extensions"]
STEMS: list[str] = _WORLD["stems"]
COMMANDS: list[str] = _WORLD["commands"]
PROGRAMS: list[str] = _WORLD["programs"]
OPTIONS: list[str] = _WORLD["options"]
CONFIG_KEYS: list[str] = _WORLD["config_keys"]
KEYS: list[str] = _WORLD["keys"]
GREETINGS: list[str] = _WORLD["greetings"]
CLOSINGS: list[str] = _WORLD["closings"]
SYSTEMS: list[str] = _WORLD["systems"]
UNKNOWN: list[str] = _WORLD["unknown"]
NOTE_HEADS: list[str] = _WORLD["note_heads"]
# Short verbs that double their last letter in the -ing form.
_DOUBLING = frozenset(_WORLD["doubling"])


def gerund(phrase: str) -> str:
    """Return the -ing form of a verb phrase: 'get rid of' gives 'getting rid of'."""
    verb, _, rest = phrase.partition(" ")
    if verb in _DOUBLING:
        verb += verb[-1]
    elif verb.endswith("ie"):
        verb = verb[:-2] + "y"
    elif verb.endswith("e") and not verb.endswith(("ee", "ye", "oe")):
        verb = verb[:-1]
    return f"{verb}ing {rest}".strip()


def capital(text: str) -> str:
    """Return the text with its first letter upper-case, unless it begins with code."""
    return text[:1].upper() + text[1:]


def number(rng: random.Random) -> str:
    """Return a number as people write it."""
    return rng.choice(
        [
            str(rng.randint(2, 12)),
            str(rng.randint(10, 99)),
            str(rng.choice([16, 32, 64, 100, 128, 200, 250, 256, 500, 512, 1000, 1024, 2048, 4096])),
            rng.choice(
                ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty", "thirty"]
            ),
            rng.choice(["half", "a quarter", "0.5", "0.1", "0.05", "1.5", "2.5", "1e-4", "2e-4", "5e-5", "0.9"]),
        ]
    )


def file_name(rng: random.Random) -> str:
    """Return an invented file or path."""
    stem = rng.choice(STEMS)
    if rng.random() < 0.3:
        stem += rng.choice("_-") + rng.choice(STEMS)
    name = f"{stem}.{rng.choice(EXTENSIONS)}"
    if rng.random() < 0.35:
        name = f"{rng.choice(STEMS)}/{name}"
    return name


def command_line(rng: random.Random) -> str:
    """Return an invented command with options."""
    parts = [rng.choice(PROGRAMS), rng.choice(COMMANDS)]
    if rng.random() < 0.5:
        parts.append(
            rng.choice(
                [
                    file_name(rng),
                    rng.choice(STEMS),
                    rng.choice(["FILE", "DIR", "NAME", "PATH", "RUN", "CONFIG", "KEY=VALUE", "TARGET"]),
                ]
            )
        )
    for option in rng.sample(OPTIONS, rng.choice([0, 1, 1, 2])):
        value = rng.choice(["", str(rng.randint(1, 64)), rng.choice(STEMS), file_name(rng), "DIR", "FILE"])
        parts.append(f"--{option} {value}".strip())
    return " ".join(parts)


def config_line(rng: random.Random) -> str:
    """Return an invented `key: value` line."""
    value = rng.choice(
        [
            str(rng.randint(0, 128)),
            "true",
            "false",
            "null",
            rng.choice(STEMS),
            file_name(rng),
            "auto",
            "none",
            "0.1",
            "1e-4",
        ]
    )
    prefix = f"{rng.choice(CONFIG_KEYS)}." if rng.random() < 0.2 else ""
    return f"{prefix}{rng.choice(CONFIG_KEYS)}: {value}"


@dataclass
class Topic:
    """Describe a topic: its slots (each with synonyms), the shapes of the question, and one answer."""

    kind: str
    verb: list[str] = field(default_factory=list)
    noun: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    qualifier: str = ""
    article: str = "the"
    answer: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Return what distinguishes the topic from others."""
        return (self.kind, (self.verb or [""])[0], (self.noun or [""])[0], (self.extra or [""])[0])


KINDS = (
    ["how"] * 7 + ["can"] * 2 + ["where"] * 2 + ["when", "who"] + ["attribute"] * 3 + ["problem"] * 4 + ["meaning"] * 2
)


def article(noun: str) -> str:
    """Return the noun with a or an; plural nouns stay bare."""
    if noun.endswith("s") and not noun.endswith("ss"):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class World:
    """Makes topics, questions and answers from the tables."""

    def __init__(self, rng: random.Random, vocabulary: list[str]) -> None:
        self.rng = rng
        self.vocabulary = vocabulary

    def _noun(self, domain: Domain) -> list[str]:
        rng = self.rng
        noun = rng.choice(domain.nouns)
        chance = rng.random()
        if chance < 0.25:
            adjective = rng.choice(COLOURS + ADJECTIVES)
            return [f"{adjective} {word}" for word in noun]
        if chance < 0.45:  # any word of the vocabulary may be part of a name, so every token gets a use
            odd = rng.choice(self.vocabulary)
            return [f"{odd} {word}" for word in noun]
        if chance < 0.55:
            return [rng.choice(self.vocabulary)]
        return noun

    def topic(self, domain: Domain | None = None, kind: str | None = None) -> Topic:
        """Return a topic with a freshly invented answer."""
        rng = self.rng
        domain = domain or rng.choice([*DOMAINS.values(), *[DOMAINS["computer"]] * 8])
        topic = Topic(
            kind or rng.choice(KINDS), noun=self._noun(domain), article=rng.choice(["the", "the", "the", "my", "a", ""])
        )
        if topic.kind in ("how", "can", "when", "who"):
            topic.verb = rng.choice(domain.verbs)
            if rng.random() < 0.2:
                topic.qualifier = rng.choice(QUALIFIERS)
        elif topic.kind == "attribute":
            topic.extra = rng.choice(ATTRIBUTES)
        elif topic.kind == "problem":
            topic.extra = rng.choice(PROBLEMS)
        topic.answer = self.answer(topic, domain)
        return topic

    def sibling(self, topic: Topic, domain: Domain) -> Topic:
        """Return a topic that shares a slot with the given one, so that one content word is not enough."""
        other = self.topic(domain, topic.kind)
        if self.rng.random() < 0.5:
            other.noun = topic.noun
        elif topic.verb:
            other.verb = topic.verb
        else:
            other.extra = topic.extra
        other.answer = self.answer(other, domain)
        return other

    def _sub(self, text: str, domain: Domain) -> str:
        rng = self.rng
        return text.format(
            tool=rng.choice(domain.tools), noun=rng.choice(domain.nouns)[0], place=rng.choice(domain.places)
        )

    def step(self, domain: Domain) -> str:
        """Return one instruction, without capital letter and full stop."""
        rng = self.rng
        noun, tool, place = rng.choice(domain.nouns)[0], rng.choice(domain.tools), rng.choice(domain.places)
        verb = rng.choice(domain.verbs)[0]
        forms: list[Callable[[], str]] = [
            lambda: f"{verb} the {noun} {rng.choice(ADVERBS)}",
            lambda: f"take the {tool} and {verb} the {noun}",
            lambda: f"wait {number(rng)} {rng.choice(UNITS[:4])}",
            lambda: f"put the {noun} next to the {rng.choice(domain.nouns)[0]}",
            lambda: f"go to the {place}",
            lambda: f"ask {rng.choice(NAMES)} for the {tool}",
            lambda: f"carry it to the {place}",
            lambda: f"check that the {noun} is {rng.choice(ADJECTIVES)}",
            lambda: f"use the {tool} on the {rng.choice(COLOURS)} side",
            lambda: f"count to {number(rng)}",
            lambda: f"write the {rng.choice(ATTRIBUTES)[0]} on the {noun}",
        ]
        if domain is DOMAINS["computer"]:
            forms += [
                lambda: f"run `{command_line(rng)}`",
                lambda: f"run `{command_line(rng)}`",
                lambda: f"set `{config_line(rng)}`",
                lambda: f"set `{config_line(rng)}` in `{file_name(rng)}`",
                lambda: f"add `--{rng.choice(OPTIONS)}` to the command",
                lambda: f"press {rng.choice(KEYS)}",
                lambda: f"open `{file_name(rng)}`",
                lambda: f"look at the {noun} in `{file_name(rng)}`",
                lambda: f"give it {number(rng)} {rng.choice(self.vocabulary)}",
                lambda: f"choose {capital(rng.choice(self.vocabulary))} in the {place}",
                lambda: f"change `{rng.choice(CONFIG_KEYS)}` from {rng.randint(1, 9)} to {rng.randint(10, 64)}",
            ]
        return rng.choice(forms)()

    def answer(self, topic: Topic, domain: Domain) -> str:
        """Return an answer to the topic; it is invented, not true."""
        rng = self.rng
        verb, noun = (topic.verb or [""])[0], topic.noun[0]
        steps = [self.step(domain) for _ in range(rng.choice([1, 2, 2, 3]))]
        plan = (
            steps[0]
            if len(steps) == 1
            else ", ".join(steps[:-1]) + rng.choice([" and ", ", then ", ", and then "]) + steps[-1]
        )
        reason = self._sub(rng.choice(CAUSES), domain)
        place = f"the {rng.choice(domain.places)}"
        where = rng.choice(
            [
                f"in {place}",
                f"near {place}",
                f"behind {place}",
                f"with {rng.choice(NAMES)}",
                f"between {place} and the {rng.choice(domain.places)}",
                f"in `{file_name(rng)}`"
                if domain is DOMAINS["computer"]
                else f"under the {rng.choice(domain.nouns)[0]}",
            ]
        )
        when = rng.choice(
            [
                f"on {rng.choice(DAYS)}",
                f"at {rng.randint(1, 12)} o'clock",
                f"in {rng.choice(MONTHS)}",
                f"after {number(rng)} {rng.choice(UNITS[:4])}",
                f"every {rng.choice(DAYS)} and {rng.choice(DAYS)}",
                f"on {rng.randint(1, 30)} {rng.choice(MONTHS)}",
            ]
        )
        if topic.kind == "how":
            return rng.choice(
                [
                    f"{capital(plan)}.",
                    f"{capital(plan)}.",
                    f"To {verb} the {noun}, {plan}.",
                    f"First {plan}. After that, {self.step(domain)}.",
                    f"{capital(plan)}; it takes {number(rng)} {rng.choice(UNITS[:4])}.",
                    f"{capital(gerund(verb))} the {noun} is easy: {plan}.",
                ]
            )
        if topic.kind == "can":
            return rng.choice(
                [
                    f"Yes, if you {steps[0]} first.",
                    f"No, because {reason}.",
                    f"Yes, but only {when}.",
                    f"No. {capital(plan)} instead.",
                    f"Yes: {plan}.",
                    f"Only {rng.choice(NAMES)} may do that.",
                ]
            )
        if topic.kind == "where":
            return rng.choice(
                [
                    f"The {noun} is {where}.",
                    f"It is {where}.",
                    f"Look {where}.",
                    f"You find the {noun} {where}, next to the {rng.choice(domain.nouns)[0]}.",
                ]
            )
        if topic.kind == "when":
            return rng.choice(
                [
                    f"{capital(when)}.",
                    f"You can {verb} the {noun} {when}.",
                    f"The right time is {when}, because {reason}.",
                ]
            )
        if topic.kind == "who":
            name = rng.choice(NAMES)
            return rng.choice(
                [f"{capital(name)} does that {when}.", f"Ask {name}.", f"{capital(name)}, who sits {where}."]
            )
        if topic.kind == "attribute":
            value = rng.choice(
                [
                    f"{number(rng)} {rng.choice(UNITS)}",
                    rng.choice(COLOURS),
                    f"{rng.choice(self.vocabulary)} {rng.randint(1, 40)}",
                    number(rng),
                ]
            )
            return rng.choice(
                [
                    f"The {topic.extra[0]} of the {noun} is {value}.",
                    f"It is {value}.",
                    f"{capital(value)}.",
                    f"{capital(value)}, and it changes {when}.",
                ]
            )
        if topic.kind == "problem":
            return rng.choice(
                [
                    f"This happens because {reason}. {capital(plan)}.",
                    f"{capital(plan)}.",
                    f"{capital(reason)}, so {plan}.",
                    f"Most often {reason}.",
                    f"Check it {where}: {reason}.",
                ]
            )
        return rng.choice(
            [
                f"{capital(article(noun))} is {article(rng.choice(ADJECTIVES) + ' ' + rng.choice(domain.nouns)[0])} "
                f"that {rng.choice(NAMES)} keeps {where}.",
                f"It is what we use to {rng.choice(domain.verbs)[0]} the {rng.choice(domain.nouns)[0]}: {plan}.",
                f"{capital(noun)} means that {reason}.",
                f"A word for the {rng.choice(ATTRIBUTES)[0]} of {article(rng.choice(domain.nouns)[0])}.",
            ]
        )

    def ask(self, topic: Topic) -> str:
        """Return one way of asking, with any of the synonyms."""
        rng = self.rng
        verb = rng.choice(topic.verb) if topic.verb else ""
        noun = rng.choice(topic.noun)
        extra = rng.choice(topic.extra) if topic.extra else ""
        art = topic.article if rng.random() < 0.5 else rng.choice(["the", "my", "a", "this", ""])
        np = article(noun) if art == "a" else f"{art} {noun}".strip()
        tail = f" {topic.qualifier}" if topic.qualifier and rng.random() < 0.8 else ""
        shape = rng.choice(SHAPES[topic.kind])
        keyword = " ".join(rng.sample([verb, noun], 2)) if verb else noun
        text = shape.format(
            vp=f"{verb} {np}{tail}",
            ger=f"{gerund(verb)} {np}{tail}" if verb else "",
            np=np,
            np_c=capital(np),
            n=noun,
            a_n=article(noun),
            x=extra,
            v=verb,
            kw=keyword + tail,
        )
        return self.roughen(text)

    def roughen(self, text: str) -> str:
        """Write a question as people do: greetings, lower case, no punctuation, a typing mistake."""
        rng = self.rng
        if rng.random() < 0.15:
            text = rng.choice(GREETINGS) + (text[:1].lower() + text[1:] if not text.startswith("I ") else text)
        if rng.random() < 0.1:
            text += rng.choice(CLOSINGS)
        chance = rng.random()
        if chance < 0.25:
            text = text.lower()
        elif chance < 0.75:
            text = capital(text)
        if rng.random() < 0.2:
            text = text.rstrip("?.!")
        if rng.random() < 0.08 and len(text) > 12:
            place = rng.randrange(3, len(text) - 2)
            text = rng.choice(
                [
                    text[:place] + text[place + 1 :],
                    text[:place] + text[place + 1] + text[place] + text[place + 2 :],
                    text[:place] + text[place] + text[place:],
                ]
            )
        return text


def chat(*turns: tuple[str, str]) -> str:
    """Return turns in the format of Phi-3's chat template."""
    return "".join(f"<|{role}|>\n{text}<|end|>\n" for role, text in turns) + "<|endoftext|>"


class Corpus:
    """Generates documents of all kinds, forever, from one seed.

    Args:
        seed: The same seed gives the same documents.
        corpus_dir: Folder of the hand-written texts.
    """

    def __init__(self, seed: int = SEED, corpus_dir: Path = CORPUS_DIR) -> None:
        self.rng = random.Random(seed)
        self.vocabulary = sorted(
            {
                w
                for name in ("words_common.txt", "words_technical.txt")
                for w in (corpus_dir / name).read_text(encoding="utf-8").split()
                if w.isalpha() and len(w) > 2
            }
        )
        technical = sorted(
            {
                w
                for name in ("words_technical.txt", "words_names.txt")
                for w in (corpus_dir / name).read_text(encoding="utf-8").split()
            }
        )
        self.technical = technical
        self.world = World(self.rng, technical * 2 + self.vocabulary)
        self.passages = [
            p.strip()
            for path in sorted(corpus_dir.glob("prose_*.txt"))
            for p in path.read_text(encoding="utf-8").split("\n\n")
            if p.strip()
        ]
        self.dialogues = [d for path in sorted(corpus_dir.glob("dialogue_*.txt")) for d in _read_dialogues(path)]
        self.questions = [q for path in sorted(corpus_dir.glob("qa_*.txt")) for q in _read_questions(path)]
        self.synonyms = [
            group for domain in DOMAINS.values() for group in (*domain.verbs, *domain.nouns) if len(group) > 1
        ]
        self.known = self._known_topics(1200)
        self.kinds: list[tuple[float, Callable[[], str]]] = [
            (0.16, self.recall),
            (0.14, self.context),
            (0.34, self.known_answer),
            (0.10, self.prose),
            (0.14, self.real_question),
            (0.05, self.dialogue),
            (0.10, self.copying),
            (0.03, self.story),
        ]

    def _known_topics(self, count: int) -> list[Topic]:
        topics: dict[tuple[str, str, str, str], Topic] = {}
        while len(topics) < count:
            topic = self.world.topic()
            topics.setdefault(topic.key, topic)
        return list(topics.values())

    def _system(self) -> list[tuple[str, str]]:
        return [("system", self.rng.choice(SYSTEMS))] if self.rng.random() < 0.3 else []

    def documents(self) -> Iterator[str]:
        """Yield documents, each ending in <|endoftext|>."""
        weights = [weight for weight, _ in self.kinds]
        makers = [maker for _, maker in self.kinds]
        while True:
            yield self.rng.choices(makers, weights)[0]()

    def _some_topics(self, count: int) -> list[Topic]:
        """Return topics of one domain, some of them easy to confuse."""
        rng = self.rng
        domain = rng.choice([*DOMAINS.values(), *[DOMAINS["computer"]] * 6])
        topics: dict[tuple[str, str, str, str], Topic] = {}
        while len(topics) < count:
            topic = (
                self.world.sibling(rng.choice(list(topics.values())), domain)
                if topics and rng.random() < 0.5
                else self.world.topic(domain)
            )
            topics.setdefault(topic.key, topic)
        return list(topics.values())

    def recall(self) -> str:
        """A chat where questions come back in other words; the answers are the same."""
        rng = self.rng
        topics = self._some_topics(rng.randint(2, 4))
        turns = self._system()
        asked = list(topics) + [rng.choice(topics) for _ in range(rng.randint(1, 3))]
        for topic in asked:
            turns += [("user", self.world.ask(topic)), ("assistant", topic.answer)]
        return chat(*turns)

    def context(self) -> str:
        """Notes that answer questions which follow in other words."""
        rng = self.rng
        topics = self._some_topics(rng.randint(2, 5))
        style = rng.random()
        lines = []
        for topic in topics:
            question = self.world.ask(topic)
            lines.append(
                f"{question} {topic.answer}" if style < 0.5 else f"- {question.rstrip('?.! ')}: {topic.answer}"
            )
        notes = "\n".join(lines)
        asked = rng.sample(topics, rng.randint(1, len(topics)))
        head = rng.choice(NOTE_HEADS)
        turns: list[tuple[str, str]] = []
        if rng.random() < 0.5:
            turns.append(("system", f"{head}\n{notes}"))
        else:
            first = asked.pop()
            turns += [("user", f"{head}\n{notes}\n\n{self.world.ask(first)}"), ("assistant", first.answer)]
        for topic in asked:
            turns += [("user", self.world.ask(topic)), ("assistant", topic.answer)]
        if rng.random() < 0.05:
            turns += [("user", self.world.ask(self.world.topic())), ("assistant", rng.choice(UNKNOWN))]
        return chat(*turns)

    def known_answer(self) -> str:
        """A question about the fixed world, whose answers have to be learned by heart."""
        turns = self._system()
        for _ in range(self.rng.choice([1, 1, 1, 1, 2])):
            topic = self.rng.choice(self.known)
            turns += [("user", self.world.ask(topic)), ("assistant", topic.answer)]
        return chat(*turns)

    def real_question(self) -> str:
        """A hand-written question and answer."""
        if not self.questions:
            return self.known_answer()
        turns = self._system()
        for _ in range(self.rng.choice([1, 1, 1, 2])):
            shapes, answer = self.rng.choice(self.questions)
            turns += [("user", self.world.roughen(self.rng.choice(shapes))), ("assistant", answer)]
        return chat(*turns)

    def dialogue(self) -> str:
        """A hand-written conversation."""
        return chat(*self.rng.choice(self.dialogues)) if self.dialogues else self.recall()

    def prose(self) -> str:
        """A hand-written passage, or a chat that asks for one to be repeated."""
        passage = self.rng.choice(self.passages)
        if self.rng.random() < 0.15:
            sentence = self.rng.choice(re.split(r"(?<=[.!?]) ", passage))
            return chat(
                ("user", f"{self.rng.choice(['Repeat', 'Say', 'Write', 'Copy'])}: {sentence}"), ("assistant", sentence)
            )
        return passage + "<|endoftext|>"

    def copying(self) -> str:
        """Lists of words, commands and settings to copy, look up or put in order."""
        rng = self.rng
        makers: list[Callable[[], str]] = [
            lambda: rng.choice(self.technical),
            lambda: rng.choice(self.technical),
            lambda: rng.choice(self.vocabulary),
            lambda: f"`{command_line(rng)}`",
            lambda: f"`{config_line(rng)}`",
            lambda: f"`{file_name(rng)}`",
            lambda: f"{rng.choice(self.technical)} {rng.choice(self.technical)}",
            lambda: f"the {rng.choice(ADJECTIVES)} {rng.choice(self.technical)}",
        ]
        maker = rng.choice(makers)
        items = list(dict.fromkeys(maker() for _ in range(rng.randint(3, 9))))
        style = rng.randrange(6)
        if style == 0:
            return chat(("user", f"Repeat: {', '.join(items)}"), ("assistant", ", ".join(items)))
        if style == 1:
            return chat(
                ("user", f"Make a list of {', '.join(items)}."), ("assistant", "\n".join(f"- {item}" for item in items))
            )
        if style == 2:
            pairs = {item: rng.choice(makers)() for item in items}
            turns: list[tuple[str, str]] = [("system", "\n".join(f"{key} = {value}" for key, value in pairs.items()))]
            for item in rng.sample(items, min(len(items), 3)):
                turns += [
                    (
                        "user",
                        rng.choice(["{}?", "What is {}?", "value of {}", "what goes with {}", "Look up {}."]).format(
                            item
                        ),
                    ),
                    ("assistant", pairs[item]),
                ]
            return chat(*turns)
        if style == 5:
            group = rng.choice(self.synonyms)
            word, other = rng.sample(group, 2)
            shape = rng.choice(
                [
                    "What is another word for {}?",
                    "another word for {}",
                    "synonym of {}",
                    "How else can I say {}?",
                    "{}, in other words?",
                ]
            )
            return chat(
                ("user", shape.format(word)),
                ("assistant", rng.choice(["{1}", "Another word for {0} is {1}."]).format(word, other)),
            )
        if style == 3:
            place = rng.randrange(len(items) - 1) if len(items) > 1 else 0
            after = items[place + 1] if len(items) > 1 else items[0]
            return chat(
                (
                    "user",
                    f"{', '.join(items)}\n"
                    f"{rng.choice(['What comes after', 'Which one follows', 'next after'])} {items[place]}?",
                ),
                ("assistant", after),
            )
        return chat(
            ("user", f"{', '.join(items)}\nWhich is the {'first' if (first := rng.random() < 0.5) else 'last'}?"),
            ("assistant", items[0] if first else items[-1]),
        )

    def story(self) -> str:
        """Generated prose about the invented world."""
        rng = self.rng
        domain = rng.choice(list(DOMAINS.values()))
        name = rng.choice(NAMES)
        sentences = []
        for _ in range(rng.randint(4, 9)):
            noun = rng.choice(domain.nouns)[0]
            verb = rng.choice(domain.verbs)[0]
            sentences.append(
                rng.choice(
                    [
                        f"{capital(name)} wanted to {verb} the {noun}, "
                        f"but {self.world._sub(rng.choice(CAUSES), domain)}.",
                        f"On {rng.choice(DAYS)} the {noun} was {rng.choice(ADJECTIVES)}, "
                        f"and in {rng.choice(MONTHS)} it was {rng.choice(ADJECTIVES)}.",
                        f'"{self.world.ask(self.world.topic(domain))}" asked {rng.choice(NAMES)}. '
                        f'"{capital(self.world.step(domain))}," said {name}.',
                        f"{capital(gerund(verb))} the {noun} took {number(rng)} {rng.choice(UNITS[:4])}.",
                        f"{capital(rng.choice(NAMES))} told {name} to {self.world.step(domain)}.",
                        f"There was {article(rng.choice(COLOURS) + ' ' + noun)} in the {rng.choice(domain.places)}.",
                    ]
                )
            )
        return " ".join(sentences) + "<|endoftext|>"


def _read_dialogues(path: Path) -> list[list[tuple[str, str]]]:
    """Read conversations: lines `S:`, `U:` and `A:`, an empty line between two conversations."""
    roles = {"S": "system", "U": "user", "A": "assistant"}
    return [
        [(roles[line[0]], line[2:].strip()) for line in block.splitlines()]
        for block in path.read_text(encoding="utf-8").split("\n\n")
        if block.strip()
    ]


def _read_questions(path: Path) -> list[tuple[list[str], str]]:
    """Read `Q: one way of asking | another` lines, each followed by its `A:` line."""
    pairs = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        if block.strip():
            question, answer = block.strip().splitlines()
            pairs.append(([shape.strip() for shape in question[2:].split("|")], answer[2:].strip()))
    return pairs


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


def ngrams(text: str, n: int = 6) -> set[tuple[str, ...]]:
    """Return the n-word sequences of a text."""
    words = words_of(text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


# Words that any question may begin or end with. A sequence with few other words is English, not somebody's text.
_FUNCTION_WORDS = frozenset(_WORLD["function_words"].split())


def is_telling(gram: tuple[str, ...]) -> bool:
    """Return whether a word sequence says something: at least three of its words carry meaning."""
    return sum(word not in _FUNCTION_WORDS for word in gram) >= 3
