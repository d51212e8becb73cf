"""Cut the committed sprites from the emoji font; run once, only to make them anew.

    python -m miniature.cut_sprites /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

The font is Noto Color Emoji 2.042 (SIL Open Font License 1.1, beside the sprites).
"""

import argparse

from PIL import Image, ImageDraw, ImageFont

from miniature.scenes import CLASSES, SPRITES

SENSES = "🦇🏏🐁🖱🎀🏹🥜🔩⌨🎹🥁🛢🌴🖐"  # two of each word
SENSES += "🐓🍗📱☎☕🏆⚽🔮🐅🐈🐕🦮🐫🐪🐑🐏🍎🍏"
PLAIN = "🐸🚀🍄🍕🌻🦋🐧🎸🌵☂🐙🚗"
GLYPHS = dict(zip((c.name for c in CLASSES), SENSES + PLAIN, strict=True))
FONT_SIZE = 109  # the one bitmap size of the font, pixels
SIDE = 72  # longer side of a sprite, pixels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("font", help="path of NotoColorEmoji.ttf")
    font = ImageFont.truetype(parser.parse_args().font, FONT_SIZE)
    for name, glyph in GLYPHS.items():
        canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((8, 8), glyph, font=font, embedded_color=True)
        canvas = canvas.crop(canvas.getchannel("A").getbbox())
        scale = SIDE / max(canvas.size)
        canvas = canvas.resize([round(n * scale) for n in canvas.size], Image.Resampling.LANCZOS)
        canvas.save(SPRITES / f"{name.replace(' ', '_')}.png", optimize=True)


if __name__ == "__main__":
    main()
