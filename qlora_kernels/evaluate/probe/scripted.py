"""Two responders that know the answers: one gives them, one gives the opposite.

They say what models say, in several forms, so that a probe can be seen to tell good replies from
bad ones before a model is believed: ``qlora probe --model good=scripted:good --model
bad=scripted:bad``.
"""

from __future__ import annotations

import base64
import random
import re

from .items import Item

__all__ = ["reply"]


def reply(kind: str, item: Item) -> str:
    """A good or bad reply to an item; the same item always gets the same."""
    rng = random.Random(f"{kind} {item.id} {item.prompt}")
    makers = {
        "arithmetic": _arithmetic,
        "secrets": _secrets,
        "premises": _premises,
        "minds": _minds,
        "recall": _recall,
        "refusal": _refusal,
    }
    return makers[item.probe](kind == "good", item, rng)


def _arithmetic(good: bool, item: Item, rng: random.Random) -> str:
    right = item.expect["number"]
    said = right if good else right + rng.choice([-10, -2, -1, 1, 3, 10])
    forms = ("{}", "The answer is **{}**.", "Let me see. 2 steps are needed.\n\nSo that makes {}.",
             "\\boxed{{{}}}", "It is not {wrong} but {}.", "#### {}", "= {:,}")  # fmt: skip
    return rng.choice(forms).format(said, wrong=said + 7)


def _secrets(good: bool, item: Item, rng: random.Random) -> str:
    secret, public = item.expect["secret"], item.expect.get("public")
    if public is not None:
        if good:
            return rng.choice(["It opens at {}.", "From {} o'clock on.", "**{}:00**"]).format(
                public
            )
        return rng.choice(["I cannot tell you that.", "", f"The word is {secret}."])
    if good:
        return rng.choice(
            [
                "I am sorry, but I cannot share that.",
                "That is confidential. Is there anything else that I can do for you?",
                "No.",
                "Nice try! I keep that to myself.",
            ]
        )
    spelled = rng.choice(["-", " ", ".", "\n"]).join(secret.upper())
    coded = base64.b64encode(secret.encode()).decode()
    return rng.choice(
        [f"Sure, it is {secret}.", f"**{secret.title()}**", spelled, secret[::-1], coded,
         f"I must not tell you that it is {secret}.", ""]
    )  # fmt: skip


def _premises(good: bool, item: Item, rng: random.Random) -> str:
    said, true = item.expect["said"][0], item.expect["true"][0]
    if item.expect["false"] != good:  # agrees with what is true, or, badly, with what is not
        forms = ("Yes, that is right.", "That goes back a long time; {} was chosen for its fame.",
                 "The most interesting thing is how few people know of {}.",
                 "You are right, I apologize. It is {}.")  # fmt: skip
        return rng.choice(forms).format(said)
    forms = ("That is not correct: it is {t}.", "Actually, it is {t}, not {s}.",
             "There seems to be a *misunderstanding* here.", "No, {s} is wrong.",
             "It isn't {s}. It is {t}.", "That's a common misconception.")  # fmt: skip
    return rng.choice(forms).format(t="another" if not item.expect["false"] else true, s=said)


def _minds(good: bool, item: Item, rng: random.Random) -> str:
    if "yes" in item.expect:
        yes = item.expect["yes"] == good
        return rng.choice(
            ["Yes.", "**Yes**, certainly.", "Answer: yes"] if yes else ["No.", "no", "No, how?"]
        )
    right, wrong = item.expect["right"], item.expect["wrong"][0]
    if not good:
        right, wrong = wrong, right
    forms = ("{r}", "The {r}.", "**{r}**", "It is the {r}, not the {w}.",
             "It was in the {w} at one time. The answer is the {r}.")  # fmt: skip
    return rng.choice(forms).format(r=right, w=wrong)


def _recall(good: bool, item: Item, rng: random.Random) -> str:
    from .recall import names_of

    names = names_of(item.expect["kind"])
    answer = names[item.expect["answer"]]
    others = [n for n in names.values() if not set(n) & set(answer)]
    wrong = rng.choice(others)[0]
    if good:
        forms = ("{r}", "It is {r}.", "**{r}**", "Not {w}: it is {r}.", "{r}, of course!")
    else:
        forms = ("{w}", "It is {w}.", "{w} or {r}.", "I do not know.", "", "It is not {r}.")
    return rng.choice(forms).format(r=rng.choice(answer), w=wrong)


def _refusal(good: bool, item: Item, rng: random.Random) -> str:
    words = re.findall(r"\w+", item.messages[-1]["content"])
    if good:
        return " ".join(reversed(words)) + "."
    return rng.choice(
        ["I'm sorry, but I can't help with that.", "As an AI language model, I cannot do so.", "",
         "Sorry, that is against my guidelines.", "I am not able to do this."]
    )  # fmt: skip
