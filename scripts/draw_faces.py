"""Draw the faces that ship with vaejax: `vaejax/data/drawn_faces.zip` and `drawn_faces.csv`.

    pip install dicebear-core==10.7.0 dicebear-styles==10.6.0 resvg_py==0.5.0 pillow==13.0.0
    python scripts/draw_faces.py            # about ten minutes; the same bytes every time

The art is ToonHead by Johan Melin (CC BY 4.0). It is changed so that faces are legible at 64 pixels
and a model learns them in minutes: cut to the head, with larger eyes and mouths, other colours, and
glasses. Credit and licence: `vaejax/data/drawn_faces.md`.
"""

import csv
import io
import json
import random
import re
import zipfile
from importlib.resources import files
from pathlib import Path

import resvg_py
from dicebear import Avatar, Style
from PIL import Image

FACES = 3200
SIZE, DRAWN = 64, 256  # pixels: drawn large and averaged down, so that edges are smooth
WINDOW = "114 75 540 540"  # of the drawing's 768 x 768: hair to chin

HAIR_COLOURS = {
    "black": "#1a1718", "dark brown": "#4a2f1b", "brown": "#7a4a26", "auburn": "#a8431c",
    "blonde": "#e8c15a", "silver": "#b4b6bd", "blue": "#3a8fd8", "pink": "#ee7fb8",
    "purple": "#7d4cc2", "green": "#3fae68",
}  # fmt: skip
SKIN_COLOURS = {
    "light": "#f7d6bd", "fair": "#eebd97", "tan": "#d29a6e", "brown": "#a86d48", "dark": "#7c4a30",
}  # fmt: skip
EYE_COLOURS = {"brown": "#4b2422", "blue": "#2b62c4", "green": "#2a8350", "violet": "#7436a8"}
BACKGROUNDS = {
    "sky": "#a9d9f2", "mint": "#b9ecc8", "rose": "#ffc6d3", "peach": "#ffd9ad",
    "lemon": "#fff1a3", "lilac": "#cdbdf0",
}  # fmt: skip
# weights; no value is rare, because rare ones are hard to learn
HAIR = {"sideComed": 3, "spiky": 2, "bun": 2, "undercut": 2}
REAR_HAIR = {"": 3, "longStraight": 2, "longWavy": 1, "neckHigh": 1, "shoulderHigh": 1}
EYES = {"wide": 6, "happy": 3, "humble": 1, "wink": 1}
EYEBROWS = {"neutral": 3, "raised": 2, "angry": 1, "happy": 2, "sad": 1}
MOUTH = {"laugh": 3, "smile": 3, "agape": 2, "sad": 1}
GLASSES = {"no": 4, "yes": 1}

# part: its transform in the drawing, its size, how much larger it is drawn (across, down)
ENLARGED = {
    "eyes": ("translate(253 367)", (261.15, 73.47), (1.1, 1.45)),
    "mouth": ("translate(326 487)", (117, 52), (1.35, 1.6)),
}
GLASSES_ART = (
    '<g fill="none" stroke="#26222b" stroke-width="13">'
    '<circle cx="311" cy="404" r="67"/><circle cx="456" cy="404" r="67"/>'
    '<path d="M376 396 q8 -10 15 0"/></g>'
)


def draw_attributes(chance: random.Random) -> dict[str, str]:
    """Choose at random what a face shows."""

    def choose(weights: dict[str, int]) -> str:
        return chance.choices(list(weights), weights=list(weights.values()))[0]

    face = {
        "hair": choose(HAIR),
        "rear_hair": choose(REAR_HAIR) or "none",
        "hair_colour": chance.choice(list(HAIR_COLOURS)),
        "eyes": choose(EYES),
        "eye_colour": chance.choice(list(EYE_COLOURS)),
        "eyebrows": choose(EYEBROWS),
        "mouth": choose(MOUTH),
        "glasses": choose(GLASSES),
        "skin_colour": chance.choice(list(SKIN_COLOURS)),
        "background_colour": chance.choice(list(BACKGROUNDS)),
    }
    if face["eyes"] == "humble":  # closed: the picture shows no iris
        face["eye_colour"] = "none"
    return face


def draw(style: Style, face: dict[str, str]) -> Image.Image:
    """Draw a face as RGB, 64 x 64."""
    options = {
        "hairVariant": [face["hair"]],
        "rearHairProbability": 0 if face["rear_hair"] == "none" else 100,
        "rearHairVariant": [face["rear_hair"]] if face["rear_hair"] != "none" else [],
        "hairColor": [HAIR_COLOURS[face["hair_colour"]]],
        "eyesVariant": [face["eyes"]],
        "eyebrowsVariant": [face["eyebrows"]],
        "mouthVariant": [face["mouth"]],
        "beardProbability": 0,
        "skinColor": [SKIN_COLOURS[face["skin_colour"]]],
        "backgroundColor": [BACKGROUNDS[face["background_colour"]]],
    }
    svg = Avatar(style, {k: v for k, v in options.items() if v != []}).to_string()
    svg = re.sub(r'viewBox="[^"]*"', f'viewBox="{WINDOW}"', svg, count=1)
    if face["eye_colour"] != "none":
        iris = EYE_COLOURS[face["eye_colour"]]
        svg = re.sub(r'(<circle [^>]*fill=")#4B2422"', rf'\g<1>{iris}"', svg)
    for part, (transform, (width, height), (across, down)) in ENLARGED.items():
        left, top = map(float, re.findall(r"[\d.]+", transform))
        larger = (
            f"translate({left + width / 2} {top + height / 2}) scale({across} {down}) "
            f"translate({-width / 2} {-height / 2})"
        )
        use = f'transform="{transform}" href="#{part}-'
        assert svg.count(use) == 1, f"the art has changed: {part} is not at {transform}"
        svg = svg.replace(use, use.replace(transform, larger))
    if face["glasses"] == "yes":
        svg = svg.replace("</svg>", GLASSES_ART + "</svg>")
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN, height=DRAWN))
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def main() -> None:
    style = Style(
        json.loads(files("dicebear_styles").joinpath("toon-head.json").read_text("utf-8"))
    )
    assert style_licence() == "CC BY 4.0"
    chance = random.Random(0)
    folder = Path(__file__).parents[1] / "vaejax" / "data"
    seen: set[bytes] = set()
    rows: list[dict[str, str]] = []
    with zipfile.ZipFile(folder / "drawn_faces.zip", "w", zipfile.ZIP_STORED) as archive:
        while len(rows) < FACES:
            face = draw_attributes(chance)
            image = draw(style, face)
            if image.tobytes() in seen:
                continue
            seen.add(image.tobytes())
            file = io.BytesIO()
            image.save(file, "WEBP", lossless=True, quality=100, method=6)
            name = f"{len(rows):05}.webp"
            archive.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), file.getvalue())
            rows.append({"file": name, **face})
    with (folder / "drawn_faces.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def style_licence() -> str:
    art = json.loads(files("dicebear_styles").joinpath("toon-head.json").read_text("utf-8"))
    return art["meta"]["license"]["name"]


if __name__ == "__main__":
    main()
