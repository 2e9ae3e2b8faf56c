"""What models write, made fit to be used: no thoughts, no fences, no half sentences. Knows no model and no question."""

import re

THOUGHTS = re.compile(r".*</think>|<think>.*", re.DOTALL)
FENCE = re.compile(r"^```\w*\n(.*?)\n?```$", re.DOTALL)
QUOTES = {'"': '"', "“": "”", "'": "'"}
SENTENCES = re.compile(r".*[.!?][\"”')]*(?=\s|$)", re.DOTALL)


def tidy(answer: str) -> str:
    """The answer in one line, without a reasoning model's thoughts, a code fence or quotes around all of it."""
    text = THOUGHTS.sub("", answer).strip()
    text = " ".join(FENCE.sub(r"\1", text).split())
    closing = QUOTES.get(text[:1])
    if closing is not None and len(text) > 1 and text.endswith(closing) and closing not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def whole_sentences(answer: str) -> str:
    """An answer that was cut short, without its unfinished last sentence; as it is where no sentence is whole."""
    match = SENTENCES.match(answer)
    return match[0] if match else answer
