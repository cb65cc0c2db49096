"""Short noun phrases in English, put into French with gender and number."""

from __future__ import annotations

import random

from demo.tasks.task import Kind, Slots, Task

# English, French, feminine?, starts with a vowel sound?
NOUNS = (
    ("house", "maison", True), ("cat", "chat", False), ("dog", "chien", False), ("book", "livre", False), ("car", "voiture", True),
    ("table", "table", True), ("garden", "jardin", False), ("door", "porte", True), ("window", "fenêtre", True), ("shirt", "chemise", True),
    ("hat", "chapeau", False), ("bag", "sac", False), ("flower", "fleur", True), ("boat", "bateau", False), ("street", "rue", True),
    ("bridge", "pont", False), ("key", "clé", True), ("chair", "chaise", True), ("bed", "lit", False), ("wall", "mur", False),
    ("dress", "robe", True), ("shoe", "chaussure", True), ("box", "boîte", True), ("letter", "lettre", True), ("forest", "forêt", True),
)  # fmt: skip
# English, masculine, feminine
ADJECTIVES = (
    ("green", "vert", "verte"), ("black", "noir", "noire"), ("white", "blanc", "blanche"), ("blue", "bleu", "bleue"), ("grey", "gris", "grise"),
    ("red", "rouge", "rouge"), ("yellow", "jaune", "jaune"), ("heavy", "lourd", "lourde"), ("light", "léger", "légère"), ("empty", "vide", "vide"),
    ("full", "plein", "pleine"), ("dirty", "sale", "sale"), ("clean", "propre", "propre"), ("broken", "cassé", "cassée"), ("open", "ouvert", "ouverte"),
    ("cold", "froid", "froide"), ("warm", "chaud", "chaude"), ("expensive", "cher", "chère"),
)  # fmt: skip


def _phrase(rng: random.Random) -> tuple[Slots, str]:
    english, french, feminine = rng.choice(NOUNS)
    word, masculine, feminine_form = rng.choice(ADJECTIVES)
    article, le, la = rng.choice((("the", "le", "la"), ("a", "un", "une"), ("my", "mon", "ma")))
    return {
        "x": f"{article} {word} {english}"
    }, f"{la if feminine else le} {french} {feminine_form if feminine else masculine}"


def _plural(rng: random.Random) -> tuple[Slots, str]:
    english, french, feminine = rng.choice([noun for noun in NOUNS if noun[0] not in {"dress", "box"}])
    word, masculine, feminine_form = rng.choice(ADJECTIVES)
    adjective = feminine_form if feminine else masculine
    noun = french + ("x" if french.endswith("eau") else "s")
    return {"x": f"the {word} {english}s"}, f"les {noun} {adjective if adjective.endswith('s') else adjective + 's'}"


PHRASINGS = (
    "Translate into French: {x}",
    "How do you say '{x}' in French?",
    "What is the French for '{x}'?",
    "French translation of '{x}'?",
    "Put '{x}' into French.",
    "Say '{x}' in French.",
    "Give me the French for: {x}",
    "In French, how would you say '{x}'?",
    "English to French: {x}",
)
HELD_OUT = (
    "How would you translate '{x}' into French?",
    "Give me the French translation of '{x}'.",
    "Say in French: {x}",
    "What is '{x}' in French?",
)

TASK = Task(
    "french",
    "Translates short English noun phrases into French.",
    (Kind(_phrase, PHRASINGS, HELD_OUT), Kind(_plural, PHRASINGS, HELD_OUT)),
)
