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
    "na\xefve Z\xfcrich S\xe3o \xd1and\xfa \xc9COLE fa\xe7ade cr\xe8me br\xfbl\xe9e \xc5ngstr\xf6m "
    "\xc6r\xf8 \u0153uvre Stra\xdfe \u0141\xf3d\u017a Dvo\u0159\xe1k \u0130stanbul \u017eena "
    "\u043c\u0438\u0440 \u041c\u043e\u0441\u043a\u0432\u0430 \u0434\u043e\u043c \u65e5\u672c \u5bff\u53f8 "
    "\u6f22\u5b57 \u03b5\u03bb\u03bb\u03ac\u03b4\u03b1 \u05e9\u05dc\u05d5\u05dd "
    "\u0645\u0631\u062d\u0628\u0627": 2,
    "100 2000 3000 12 345 6789 2014-2015 O\u2019Reilly d\u2019Ve \U0001f600 \U0001f44d\U0001f3fd "
    "\u2764\ufe0f \u2600 \u2605 \u2665 \u2192 \xa9 \xae \u2122 \u20ac \xa35 \xa5100 20\u20ac 5\xb0 "
    "72\xb0F \xbd \xbe 1\xbd m\xb2 x\xb3 \u2116 \xa7 \xb6 \u2022 \xb7 \u2026 \xab \xbb \u201e \u201a "
    "\u2039 \u203a \u2013 \u2014 \u2010 \u2212 \xd7 \xf7 \u2248": 2,
    "(555) 123-4567 555-1234 1 1/2 3/4 www.example.com http://a.b/c?d=e me@here.org @user #tag $1.5 "
    "\xa33.50 10% 3-D 4K 1920x1080 7:30am 6'2\" 24/7": 2,
    "'em 'til rock'n'roll o'clock ma'am y'all 'twas 'tis d'oh ol' c'mon L'Oreal n' '90s e'er who're "
    "would've shan't ain't gimme lemme wanna gotta": 2,
    "Sgt. Capt. Lt. Col. Gen. Rev. Prof. Gov. Sen. Rep. Corp. Ltd. Bros. Feb. Sept. Tues. Sat. Blvd. Rd. "
    "Mt. Ft. U.K. U.N. Ph.D. M.D. D.C. P.S. No. no. fig. pp. Fig. Calif. Mass. Ill. La.": 2,
    ":) :( ;-) :D <3 :-/ XD ^_^ -_- o_O (: =)": 1,
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
