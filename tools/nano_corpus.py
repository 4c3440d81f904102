"""The text that the bundled nano model is pretrained on: written or generated here, nothing copied.

Hand-written files stand in `tools/corpus/`; everything else is generated from the tables below with a seed. Documents are
small: chats in Phi's format about an invented world, passages with questions about them, lists, commands and plain prose. The
tables know synonyms and each question is asked in many shapes, so that a model has to find the words that matter; most answers
are random, so that it has to read them from what came before. None of it is about philora or fine-tuning: technical words
occur as words only, which gives each of them an embedding that an adapter can use.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

CORPUS_DIR = Path(__file__).parent / "corpus"
SEED = 20240501


def _table(text: str) -> list[list[str]]:
    """Read `a|b, c` as [[a, b], [c]]: entries with their synonyms."""
    return [
        [word.strip() for word in entry.split("|")] for entry in text.replace("\n", " ").split(",") if entry.strip()
    ]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.replace("\n", " ").split(",") if word.strip()]


@dataclass(frozen=True)
class Domain:
    """A corner of the invented world: what people do there, to what, with what and where."""

    verbs: list[list[str]]
    nouns: list[list[str]]
    tools: list[str]
    places: list[str]


DOMAINS = {
    "kitchen": Domain(
        _table(
            "clean|wash|scrub, cook|prepare|make, store|keep, heat|warm up, cool|chill, cut|slice|chop, open, repair|fix|mend, buy|get, throw away|bin, season|spice, mix|stir, dry, fill"
        ),
        _table(
            "kettle, oven|stove, pan|frying pan, pot, soup|broth, bread|loaf, dough, cake, knife, cheese, butter, fridge|refrigerator, rice, onions, potatoes, apples, coffee machine, tea, salad, sauce, fish, jam, jar, cupboard, dish|plate, sink, bowl, honey, flour, pie"
        ),
        _words(
            "wooden spoon, soft cloth, sharp knife, small brush, lemon, hot water, clean towel, paper, thin wire, salt, vinegar, glass jar"
        ),
        _words("top shelf, lower drawer, pantry, cellar, window sill, blue cupboard, back porch, cold room"),
    ),
    "garden": Domain(
        _table(
            "plant|put in, water, cut|trim|prune, move|transplant, protect|cover, remove|pull out|get rid of, collect|gather|pick, feed, paint, repair|fix|mend, measure, dig up, buy|get, clean"
        ),
        _table(
            "roses, tomatoes, hedge, lawn|grass, apple tree, pear tree, herbs, mint, weeds, fence, gate, pond, bench, path, greenhouse|glass house, seeds, pots, leaves, hose|water pipe, spade|shovel, beans, berries, bees, bird house, shed|garden hut, compost"
        ),
        _words(
            "spade, old bucket, pair of gloves, wooden stick, long rope, rake, sharp scissors, wet straw, grey net, watering can"
        ),
        _words("shed, south wall, old oak, greenhouse, stone steps, back gate, corner by the pond, vegetable bed"),
    ),
    "bicycle": Domain(
        _table(
            "repair|fix|mend, clean|wash, oil|grease, replace|change|swap, tighten, adjust|set, remove|take off, lock|secure, lift, check|inspect|test, paint, pump up, sell, rent|hire"
        ),
        _table(
            "bicycle|bike, chain, tyre|tire, front wheel, rear wheel|back wheel, brake|brakes, pedal, saddle|seat, bell, light|lamp, basket, lock, frame, gear|gears, pump, helmet, trailer, handlebar"
        ),
        _words("small spanner, clean rag, drop of oil, screwdriver, spare tube, steel brush, rubber band, short chain"),
        _words("workshop, yard, cellar, bike rack, station, bridge, green shed, back wall"),
    ),
    "travel": Domain(
        _table(
            "book|reserve, cancel, change|switch, pay for, find|locate, reach|get to, leave, use, miss, buy|get, collect|pick up, check|look up, print, return|give back"
        ),
        _table(
            "train, night train, ticket, seat, bus, ferry|boat, flight|plane, hotel|room, suitcase|bag|luggage, passport, map, platform, timetable|schedule, taxi|cab, bridge, harbour|port, station, airport, waiting room, locker, refund, group ticket, tour|trip"
        ),
        _words(
            "blue counter, ticket machine, yellow form, station office, phone line, printed receipt, small desk, help point"
        ),
        _words("platform three, main hall, east gate, first floor, harbour, old station, north exit, information desk"),
    ),
    "library": Domain(
        _table(
            "borrow|check out, return|bring back, renew|extend, find|locate, order|request, reserve, copy|scan, read, join, pay, lose, use, donate|give away, search|look through"
        ),
        _table(
            "book|novel, newspaper|paper, magazine, film|movie, map, library card|card, reading room, story hour, catalogue, music, dictionary, encyclopedia, letter, poem, shelf, locker, copy machine|scanner, desk, study room, audio book, fee|fine|charge"
        ),
        _words("green form, front desk, library card, small ladder, index, red stamp, reading lamp, return box"),
        _words("second floor, reading room, archive, front desk, garden door, left wing, children's corner, cellar"),
    ),
    "school": Domain(
        _table(
            "start|begin, finish|complete, hand in|submit, prepare, read, write, correct|mark, learn|study, forget, miss, present|show, count, join, leave"
        ),
        _table(
            "homework|assignment, lesson|class, exam|test, essay, project, poem, book report, timetable|schedule, music lesson, school trip, notebook|exercise book, drawing, sports day, lunch, choir, chess club, register, report, history lesson, laboratory|lab"
        ),
        _words("pencil, ruler, grey folder, wall map, dictionary, blackboard, list of names, red pen"),
        _words("room twelve, main hall, gym, library, yard, teacher's office, first floor, music room"),
    ),
    "house": Domain(
        _table(
            "paint, clean, repair|fix|mend, lock|secure, open, close|shut, heat|warm, move, turn on|switch on, turn off|switch off, replace|change|swap, measure, sell, insure, hang|put up"
        ),
        _table(
            "roof, door, window, lamp|light, bulb, heating|radiator, carpet|rug, curtain, bath|tub, shower, tap|faucet, wall, ceiling, stairs|steps, key, bed, table, chair, sofa|couch, clock, mirror, picture, garage, chimney, doorbell, letter box|mailbox, alarm"
        ),
        _words("ladder, hammer, bucket, screwdriver, soft brush, old sheet, measuring tape, thin nail"),
        _words("attic, hall, cellar, kitchen drawer, garage, top floor, back door, wardrobe"),
    ),
    "weather": Domain(
        _table(
            "predict|forecast, measure, watch|observe, record|note, avoid, expect, explain, describe, compare, photograph"
        ),
        _table(
            "rain, snow, storm, wind, fog|mist, frost, sunshine|sun, thunder, temperature, clouds, rainbow, ice, tide, season, heat wave, drought, wave"
        ),
        _words("glass tube, wooden box, weather map, wind vane, old diary, telescope"),
        _words("hill, harbour wall, lighthouse, roof, valley, north coast, mountain hut"),
    ),
    "health": Domain(
        _table(
            "treat|heal, clean, cover, rest, stretch, measure|check, cool, protect, train, feed, carry, wash, visit, call|phone"
        ),
        _table(
            "knee, back, wound|cut, burn, cold, fever, headache, eyes, teeth, hand|hands, foot, throat, patient, doctor, nurse, dog, cat, horse, baby, puppy, parrot, rabbit, goldfish"
        ),
        _words("warm blanket, cold cloth, glass of water, clean bandage, soft brush, cup of tea, thermometer"),
        _words("room four, clinic, stable, quiet corner, pharmacy, waiting room, kitchen, basket"),
    ),
    "money": Domain(
        _table(
            "pay, send|transfer, save, borrow, count, exchange|change, check|verify, cancel, claim|request, split|share|divide, lower|reduce|cut, raise|increase, sign, close"
        ),
        _table(
            "bill|invoice, rent, fee|charge, loan, deposit, account|bank account, card, salary|wage|pay, tax, coins, receipt, budget, discount, contract|agreement, insurance, price, membership, donation|gift, refund"
        ),
        _words("blue form, bank counter, monthly letter, signed copy, small calculator, second signature"),
        _words("bank, post office, counter two, town hall, first drawer, main office, safe"),
    ),
    "office": Domain(
        _table(
            "print, send|mail, sign, copy|duplicate, file, order, cancel, move|reschedule, open, close, prepare|set up, find|locate, share, book|reserve, write"
        ),
        _table(
            "letter, meeting, report|summary, contract|agreement, desk, printer, calendar, parcel|package, envelope, stamp, invoice|bill, list, form|questionnaire, phone call|call, visitor|guest, minutes|notes, projector|beamer, whiteboard, coffee, holiday|vacation"
        ),
        _words("red folder, front desk, spare key, blue tray, stapler, printed list, secretary, side door"),
        _words("meeting room, third drawer, front desk, archive, ground floor, tray by the door, corner office"),
    ),
    "computer": Domain(
        _table(
            "delete|remove|erase|get rid of, copy|duplicate, rename, move, open|launch, save|store|keep, restore|recover|get back, change|edit|modify|alter, install|set up, update|upgrade, find|locate|search for, close|quit|exit, share, print, compress|shrink, sort|order, export, import|bring in, reset, lock|protect, download|fetch, upload, compare, check|verify|validate, combine|join|merge, split|divide, hide, show|display, convert|turn, turn on|enable|activate, turn off|disable|deactivate, speed up, stop|interrupt|cancel, restart|reboot, continue|resume"
        ),
        _table(
            "file, folder|directory, command, error|error message, script, page, setting|option, menu, data, table|spreadsheet, picture|image|photo, text, document, program|application|app, password, window, printer, keyboard, screen|monitor|display, disk|drive, memory, backup|copy, list, column, line, row, log, server, browser, link, message, email|mail, account|profile, network, archive, version, format, name, cache, queue, job|task, package, plugin|extension, device, session, font|typeface, language, clock, report, test, result, number, key, value, path, template, process, history"
        ),
        _words("search box, right mouse key, settings page, command line, side menu, second tab, terminal, tool bar"),
        _words("home folder, settings page, top menu, second tab, project folder, log file, side panel, main window"),
    ),
}

PROBLEMS = _table(
    "does not work|is broken|isn't working|doesn't do anything, is too slow|takes forever|is very slow, makes a noise|is noisy, does not open|won't open|refuses to open, keeps stopping|stops all the time|dies again and again, is missing|is gone|has disappeared, is full|has no room left, is too large|is too big, looks wrong|looks strange|comes out wrong, does not fit|doesn't fit, fails|keeps failing|fails every time, leaks, smells bad|smells strange, is stuck|won't move, is empty|has nothing in it, gets too hot|runs hot|overheats"
)
CAUSES = _words(
    "the {tool} was left in it, it is older than ten years, the {noun} next to it is too close, somebody changed the {noun} without saying so, it needs a new {noun}, the {place} is too cold for it, it was put together in the wrong order, the {noun} is worn out, nobody has cleaned it since spring, two parts of it have the same number, it was started twice, the {noun} has moved to the {place}, there is dust on the {noun}, it waits for the {noun}"
)
QUALIFIERS = _words(
    "at home, in winter, in summer, for a friend, without help, on a Sunday, in the dark, before breakfast, by hand, for the first time, after work, twice a day, outside, on another machine, for children, in a hurry, with one hand, at night, from abroad, alone"
)
NAMES = _words(
    "Anna, Ben, Clara, David, Elena, Finn, Grace, Hugo, Ines, Jack, Karin, Leo, Maria, Nils, Olga, Paul, Rosa, Sam, Tina, Victor, Wendy, Yara, Zoltan, Ivan, Sofia, Mihai, Ingrid, Dana, Mr Hall, Mrs Moore, Mr Stone, Mrs Lake, Doctor Green, my uncle, the neighbour, the teacher, the gardener, the clerk, the nurse, the driver, the baker, the librarian, the cook, the mechanic, the guide"
)
COLOURS = _words("red, blue, green, yellow, white, black, grey, brown, orange, pink, silver, golden, dark, pale")
ADJECTIVES = _words(
    "small, large, old, new, heavy, light, round, flat, wooden, cheap, clean, broken, quiet, wet, warm, cold, soft, narrow, wide, bright"
)
ADVERBS = _words(
    "slowly, carefully, gently, twice, once more, from left to right, at the same time, with both hands, evenly, firmly, every evening, before noon, step by step, as usual, quickly, in small parts"
)
DAYS = _words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = _words("January, February, March, April, May, June, July, August, September, October, November, December")
UNITS = _words(
    "minutes, hours, days, weeks, metres, miles, grams, litres, pages, steps, euros, coins, boxes, lines, rows, bytes, seconds, pieces, percent, degrees"
)
ATTRIBUTES = _table(
    "price|cost, size, weight, length, height, number of parts, limit|maximum, default value|default|usual value, name, colour, age, speed, temperature, capacity|room, format, order, version, width, smallest value|minimum, address"
)
EXTENSIONS = _words("txt, json, yaml, csv, md, log, py, toml, zip, html, bin, cfg, jsonl, png")
STEMS = _words(
    "notes, list, report, config, data, index, main, table, plan, photos, page, log, output, input, names, prices, letters, results, settings, readme, words, setup, run, test, draft, map, old, new, final, summary"
)
COMMANDS = _words(
    "list, copy, show, sort, print, count, send, fetch, pack, clean, check, find, start, stop, add, drop, join, split, move, watch, render, draw, sync, plan, open, close, mix, weigh, water, bake, ring, lend, serve, report, export, import, push, pull, merge, train, evaluate, generate, chat, config, demo"
)
PROGRAMS = _words(
    "gardenctl, breadbot, ferry, maptool, birdlog, choir, penny, lampd, oven, shelf, postbox, tram, beeline, inkpot, weft, kettle, quill, orchard, sundial, clockwork"
)
OPTIONS = _words(
    "out, name, size, limit, format, level, color, page, data, text, width, depth, count, force, quiet, verbose, json, web, dry-run, all, from, to, since, key, port, max, min, seed, steps, rank, path, help, version, resume, base, rate, device, dtype, mode, lines, prompts"
)
CONFIG_KEYS = _words(
    "name, path, size, limit, color, format, level, page, width, mode, count, key, output, input, model, data, train, eval, seed, rank, steps, rate, device, dtype, cache, batch, length, template, adapter, tokenizer, language, unit, interval, timeout, host, port, max_length, min_size, page_size, save_steps, use_cache, log_level, target_modules, learning_rate, batch_size, out_dir, warmup, model_max_length, weight_decay, num_epochs"
)
KEYS = _words("Enter, Escape, Control C, Control S, F1, F5, Delete, Tab, Shift, Control Z, the space bar, Alt F4")

_DOUBLING = {
    "cut",
    "get",
    "stop",
    "put",
    "plan",
    "set",
    "dig",
    "rub",
    "swap",
    "trim",
    "bin",
    "begin",
    "chop",
    "pop",
    "hit",
    "run",
    "shut",
    "rent out",
    "submit",
    "scrub",
    "stir",
    "spam",
    "quit",
    "split",
    "scan",
}


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
    """One thing that can be asked: its slots (each with synonyms), the shapes of the question, and one answer."""

    kind: str
    verb: list[str] = field(default_factory=list)
    noun: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    qualifier: str = ""
    article: str = "the"
    answer: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes the topic different from others."""
        return (self.kind, (self.verb or [""])[0], (self.noun or [""])[0], (self.extra or [""])[0])


SHAPES: dict[str, list[str]] = {
    "how": [
        "How do I {vp}?",
        "How can I {vp}?",
        "how to {vp}",
        "What is the best way to {vp}?",
        "What's the right way of {ger}?",
        "I want to {vp}. What should I do?",
        "i need to {vp}, how?",
        "Tell me how to {vp}.",
        "Is there a way to {vp}?",
        "Which steps do I take to {vp}?",
        "I would like to {vp} but I don't know how.",
        "Explain {ger}, please.",
        "{kw}",
        "{ger}?",
        "{ger}: what do I have to do?",
        "Need help with {ger}.",
        "Could you tell me how to {vp}?",
        "how would you {vp}",
        "My plan is to {vp}. Where do I begin?",
        "What do I do when I want to {vp}?",
        "any tips for {ger}",
        "Show me how to {vp}.",
        "I am trying to {vp}.",
        "what does it take to {vp}",
        "How does one {vp}?",
        "I have to {vp} today, what now?",
        "someone asked me to {vp}, and i have no idea",
        "Instructions for {ger}?",
        "what must i do to {vp}",
        "How should {np} be handled if I want to {v} it?",
    ],
    "can": [
        "Can I {vp}?",
        "Am I allowed to {vp}?",
        "Is it possible to {vp}?",
        "may i {vp}",
        "Is {ger} allowed?",
        "is {ger} possible",
        "Would it be all right to {vp}?",
        "Does anybody mind if I {vp}?",
        "I'd like to {vp}. Is that okay?",
        "{kw} allowed?",
        "Could I {vp}?",
        "Is there anything against {ger}?",
        "do the rules let me {vp}",
        "ok to {vp}?",
        "Will it work if I {vp}?",
    ],
    "where": [
        "Where is {np}?",
        "Where can I find {np}?",
        "where do i look for {np}",
        "I can't find {np}.",
        "In which place is {np}?",
        "What is the location of {np}?",
        "{n} where",
        "where did they put {np}",
        "Where is {np} kept?",
        "Do you know where {np} is?",
        "looking for {np}",
        "Which place is {np} in?",
        "I have lost {np}. Where should I look?",
        "where has {np} gone",
        "Where does {np} live?",
    ],
    "when": [
        "When can I {vp}?",
        "At what time may I {vp}?",
        "When is the right time for {ger}?",
        "which day is for {ger}",
        "On what day should I {vp}?",
        "when do we {vp}",
        "Tell me when to {vp}.",
        "What's the time for {ger}?",
        "how soon can i {vp}",
        "{kw} when",
        "When should I {vp}?",
        "Is there a fixed day for {ger}?",
        "by when must i {vp}",
    ],
    "who": [
        "Who will {vp}?",
        "Whom do I ask to {vp}?",
        "who can {vp}",
        "Who is responsible for {ger}?",
        "Which person should {vp}?",
        "who takes care of {ger}",
        "Is there somebody who can {vp}?",
        "{kw} who",
        "Whose job is {ger}?",
        "Who knows how to {vp}?",
        "I need someone to {vp}.",
    ],
    "attribute": [
        "What is the {x} of {np}?",
        "Tell me the {x} of {np}.",
        "{n} {x}",
        "which {x} does {np} have",
        "Do you know the {x} of {np}?",
        "what {x} has {np}",
        "I need the {x} of {np}.",
        "{x} of {np}?",
        "what's the {x} for {np}",
        "Can you look up the {x} of {np}?",
        "the {x} of {np}, please",
        "What {x} should I expect for {np}?",
    ],
    "problem": [
        "{np_c} {x}. What can I do?",
        "Why is it that {np} {x}?",
        "My {n} {x}, why?",
        "help, my {n} {x}",
        "{np} {x}",
        "What is the reason that {np} {x}?",
        "i think {np} {x}, what's wrong",
        "{np_c} {x} since yesterday. What happened?",
        "my {n} {x}. any idea?",
        "What do I do if {np} {x}?",
        "It seems that {np} {x}. How do I fix that?",
        "{n} {x}",
        "Do you know why {np} {x}?",
        "what to do when {np} {x}",
        "Again {np} {x}, and I don't see why.",
    ],
    "meaning": [
        "What is {a_n}?",
        "What does {n} mean?",
        "Explain {n}.",
        "define {n}",
        "what do people mean by {n}",
        "meaning of {n}",
        "I don't know what {a_n} is.",
        "Tell me about {np}.",
        "what's {a_n} good for",
        "Can you explain what {a_n} is?",
        "{n}?",
        "I keep hearing the word {n}. What is it?",
        "What do you call {a_n}?",
    ],
}
GREETINGS = [
    "Hi, ",
    "Hello! ",
    "hey ",
    "Good morning. ",
    "Sorry, ",
    "Quick question: ",
    "Excuse me, ",
    "please ",
    "um, ",
    "So, ",
    "One more thing: ",
    "ok, ",
    "Hello there, ",
]
CLOSINGS = [
    " Thanks!",
    " thanks",
    " Thank you.",
    " please",
    " It is urgent.",
    " I am new here.",
    " Sorry for asking.",
    " Any ideas?",
    " I could not find it.",
    " thx",
]
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
                f"{capital(article(noun))} is {article(rng.choice(ADJECTIVES) + ' ' + rng.choice(domain.nouns)[0])} that {rng.choice(NAMES)} keeps {where}.",
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


SYSTEMS = [
    "You are a helpful assistant.",
    "Answer briefly.",
    "You answer questions about the house and the garden.",
    "Be short and friendly.",
    "You are the voice of the information desk.",
    "Answer in one sentence.",
    "You are a patient teacher.",
    "Give exact answers.",
    "You work at the front desk and know the notes by heart.",
    "Help people with their questions.",
    "Say what to do, in order.",
    "Be polite.",
]
UNKNOWN = ["I don't know; the notes don't say.", "That is not in the notes.", "Sorry, I have nothing about that."]
NOTE_HEADS = [
    "Notes:",
    "What we know:",
    "From the handbook:",
    "Facts:",
    "The list on the wall says:",
    "Yesterday's notes:",
    "Remember this:",
]


class Corpus:
    """Generates documents of all kinds, forever, from one seed.

    Args:
        seed: The same seed gives the same documents.
        hand_written: Texts to mix in; `read_hand_written()` by default.
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
        self.known = self._known_topics(1200)
        self.kinds: list[tuple[float, Callable[[], str]]] = [
            (0.22, self.recall),
            (0.20, self.context),
            (0.20, self.known_answer),
            (0.10, self.prose),
            (0.12, self.real_question),
            (0.05, self.dialogue),
            (0.06, self.copying),
            (0.05, self.story),
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
        style = rng.randrange(5)
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
        if style == 3:
            place = rng.randrange(len(items) - 1) if len(items) > 1 else 0
            after = items[place + 1] if len(items) > 1 else items[0]
            return chat(
                (
                    "user",
                    f"{', '.join(items)}\n{rng.choice(['What comes after', 'Which one follows', 'next after'])} {items[place]}?",
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
                        f"{capital(name)} wanted to {verb} the {noun}, but {self.world._sub(rng.choice(CAUSES), domain)}.",
                        f"On {rng.choice(DAYS)} the {noun} was {rng.choice(ADJECTIVES)}, and in {rng.choice(MONTHS)} it was {rng.choice(ADJECTIVES)}.",
                        f'"{self.world.ask(self.world.topic(domain))}" asked {rng.choice(NAMES)}. "{capital(self.world.step(domain))}," said {name}.',
                        f"{capital(gerund(verb))} the {noun} took {number(rng)} {rng.choice(UNITS[:4])}.",
                        f"{capital(rng.choice(NAMES))} told {name} to {self.world.step(domain)}.",
                        f"There was a {rng.choice(COLOURS)} {noun} in the {rng.choice(domain.places)}.",
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


# Words that any question may begin or end with. A sequence with fewer than two other words is English, not somebody's text.
_FUNCTION_WORDS = frozenset(
    """a an the this that these those my your its our and or but if of to in on at for with from by as up out is are am be was were
    do does did can could may might must shall should will would have has had i you it he she we they me us them what which who
    how when where why there here not no so than then too very just only about way possible want need know tell get put set use
    make find go say help please don't i'm it's what's i'd best right good any some one thing""".split()
)


def is_telling(gram: tuple[str, ...]) -> bool:
    """Return whether a word sequence says something: at least two of its words carry meaning."""
    return sum(word not in _FUNCTION_WORDS for word in gram) >= 2
