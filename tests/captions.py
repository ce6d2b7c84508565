"""Lines as people type captions, and their tokens by pycocoevalcap's Java program."""

from random import Random

from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

PIECES = {  # words, and how often one of them is drawn
    "a the man woman dog's dogs sitting on of street in front large red bus stop tennis court": 12,
    "John O'Brien McDonald's Coca-Cola iPhone USA NYC London St. Louis U.S. Dr. Smith": 2,
    "isn't can't don't it's he's they're we've I'm you'll she'd who's let's won't cannot gonna": 2,
    "2 10 3.5 1,000 50% $5 $4.99 1/2 10:30 5pm 1980's 80s 1st 22nd 6-year-old #1 No. 7 12/25/2014 2x4": 2,
    "black-and-white t-shirt X-ray state-of-the-art well-dressed up-to-date -- 3-4 and/or his/her": 2,
    "p.m. a.m. etc. vs. Mr. Mrs. e.g. i.e. Inc. Co. Jr. J. R. R. approx. ft. Ave. Jan. Mon. B&B R&B AT&T": 2,
    "\u201cSTOP\u201d don\u2019t it\u2019s \u2018no\u2019 caf\u00e9 jalape\u00f1o \u2013 \u2014 \u00bd 5\u00b0": 1,
}
MARKS = [",", ".", "!", "?", ";", ":", "...", "!!", "?!", ")", '"', "'", ".)", '."', "'s", ".'"]
OPENINGS = ['"', "'", "(", "``", "[", "$", "#", "-"]


def written(random: Random) -> str:
    """A line as people type captions: any order, but each piece an ordinary one."""
    pieces = []
    for _ in range(random.randint(0, 14)):
        word = random.choice(random.choices(list(PIECES), list(PIECES.values()))[0].split())
        word = random.choice(OPENINGS) + word if random.random() < 0.05 else word
        word = word + random.choice(MARKS) if random.random() < 0.15 else word
        word = word.capitalize() if random.random() < 0.1 else word
        pieces.append(word.upper() if random.random() < 0.03 else word)
    return " ".join(pieces)


def oracle_tokens(captions: list[str]) -> list[list[str]]:
    found = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
    return [found[i][0].split() for i in range(len(captions))]
