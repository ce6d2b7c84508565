"""Stems of OK-VQA answers, as the data set's own answers were stemmed.

The annotators' answers of OK-VQA v1.1 are stemmed, so a prediction is stemmed before it is compared
(``vqa_metrics.vqa_accuracy(..., stem=ok_vqa.stem)``). OpenFlamingo does that; lmms-eval does not. NLTK and inflection
do the work; NLTK's data are found where it looks for them, or fetched once.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache

from hpc_mm.config import ConfigError

DATA = {  # NLTK's name of a package -> one of the places where it may be
    "punkt_tab": ("tokenizers/punkt_tab/english/",),
    "averaged_perceptron_tagger_eng": ("taggers/averaged_perceptron_tagger_eng/",),
    "wordnet": ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"),
}
# Words that the rules below stem otherwise than the data set does; found by OpenFlamingo's authors (ok_vqa_utils.py).
EXCEPTIONS = (
    "adhesives:adhesive alertness:alert alpes:alp apartments:apart are:are awning:awn backpackers:backpack "
    "badness:bad baldness:bald bases:base batter's:batter belongings:belong blindness:blind boy's:boy braves:brave "
    "brightness:bright browsing:brows buildings:build casings:case caves:cave charioteering:chariot "
    "childrens:children christmas:christmas circuses:circus clothes:cloth clothing:cloth coding:code "
    "conducter:conduct conferences:confer coniferous:conifer containers:contain controllers:control corgie:corgi "
    "couponing:coupon creame:cream crepte:crept cumulis:cumuli curiousity:curious dangerous:danger "
    "daughter's:daughter decorations:decor designers:design dining:dine directions:direct domino's:domino "
    "doves:dove drives:drive drunkenness:drunken earing:ear earnings:earn eatting:eat electicity:elect "
    "electronics:electron elevators:elev emirates:emir expressions:express farmer's:farmer firefighters:firefight "
    "firefighting:firefight glaced:glace gloves:glove gondoliere:gondolier graves:grave haircutting:haircut "
    "hamburgers:hamburg hawke:hawk hearding:heard hell's:hell hornes:horn illness:ill jeans:jean kid's:kid "
    "kindergartener:kindergarten kiting:kite las:las leaves:leaf lenses:lens lowes:low markings:mark "
    "married:married mating:mate meetings:meet men's:men microwaves:microwave minerals:miner mopeds:mope "
    "morning:morn mountainous:mountain mustange:mustang nationals:nation overseas:oversea oxygenize:oxygen "
    "paintings:paint paned:pane paring:pare pease:peas personals:person pies:pie piping:pipe plating:plate "
    "playfulness:play polarizing:polar police:police pooping:poop porche:porch potatoe:potato "
    "professionals:profession projections:project propellers:propel protesters:protest pudding:pud purring:pure "
    "quantas:quanta rabbies:rabbi raines:rain reflections:reflect regent's:regent reminders:remind reporters:report "
    "revelations:revel riding:ride ringe:ring ripeness:ripe rodeoing:rodeo routes:rout sadness:sad sautee:saute "
    "scrapbooking:scrapbook settings:set shelves:shelve sickness:sick skateboarders:skateboard smugness:smug "
    "socializing:social sometimes:sometime staring:stare stockings:stock striping:stripe sunbathing:sunbath "
    "sunblocker:sunblock suspenders:suspend swining:swine teasing:teas teething:teeth tenning:ten tennis:tennis "
    "texting:text ties:tie toileting:toilet tomatoe:tomato toppings:top transitions:transit travelers:travel "
    "travellers:travel urinating:urine vacationing:vacate vandalizers:vandal vastness:vast vegas:vegas "
    "veteran's:veteran wading:wade walle:wall waves:wave weddings:wed wetness:wet wilderness:wilder womens:women "
    "yes:yes"
)
STEMS = dict(pair.split(":") for pair in EXCEPTIONS.split())


def stem(text: str) -> str:
    """The stems of a text's words, joined by spaces (OpenFlamingo's ok_vqa_utils.py).

    A word of the list of exceptions has its stem there; one that ends in "ing" becomes WordNet's verb; plural nouns, by
    NLTK's tagger, become singular. Missing data or packages are a ConfigError.
    """
    tagged, lemma, singular = _tools()

    def stem_of(word: str, tag: str) -> str:
        if word in STEMS:
            return STEMS[word]
        if word.endswith("ing"):
            return lemma(word)
        return singular(word) if tag.startswith(("NNS", "NNPS")) else word

    return " ".join(stem_of(word, tag) for word, tag in tagged(text))


@cache
def _tools() -> tuple[Callable[[str], list[tuple[str, str]]], Callable[[str], str], Callable[[str], str]]:
    """Words with their tags, a verb's lemma, a noun's singular."""
    try:
        import inflection
        import nltk
    except ImportError as error:
        raise ConfigError(f"OK-VQA answers are stemmed with {error.name}: pip install 'hpc_mm[eval]'") from None
    fetch()
    lemmatizer = nltk.stem.WordNetLemmatizer()
    return (
        lambda text: nltk.pos_tag(nltk.word_tokenize(text)),
        lambda word: str(lemmatizer.lemmatize(word, "v")),
        lambda word: str(inflection.singularize(word)),
    )


def fetch() -> None:
    """Make sure that NLTK's data are there; a ConfigError says how to bring what cannot be fetched from here."""
    import nltk

    for name in filter(_missing, DATA):
        nltk.download(name, quiet=True, print_error_to=io.StringIO())
    missing = list(filter(_missing, DATA))
    if missing:
        raise ConfigError(
            f"NLTK's {', '.join(missing)}, which stem OK-VQA's answers, cannot be found or fetched: where there is a "
            f"network run python -m nltk.downloader -x -d FOLDER {' '.join(missing)}, then set NLTK_DATA=FOLDER here"
        )


def _missing(name: str) -> bool:
    import nltk

    for place in DATA[name]:
        try:
            nltk.data.find(place)
        except LookupError:
            continue
        return False
    return True
