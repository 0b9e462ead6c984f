"""Which family a model is of."""

from server.text.families.deepseek_v3 import DeepseekV3
from server.text.families.family import Family
from server.text.families.harmony import Harmony
from server.text.families.hermes import Hermes
from server.text.families.kimi_k2 import KimiK2
from server.text.families.llama3_json import Llama3Json

FAMILIES: tuple[Family, ...] = (DeepseekV3(), KimiK2(), Harmony(), Hermes(), Llama3Json())
PLAIN = Hermes()  # what models are told to write whose template knows no tools


def family_of(template: str | None) -> Family:
    """By the markers that the chat template itself writes; all signs of a family must be there."""
    for family in FAMILIES:
        if template is not None and all(sign in template for sign in family.signs):
            return family
    return PLAIN
