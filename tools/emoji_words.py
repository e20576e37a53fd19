"""English for `tools/build_emoji.py`: what a caption says for a Unicode name, and the parts of the name."""

import re

WHO = {"person": "", "man": "male", "woman": "female", "people": "", "men": "male", "women": "female"}
COLOURS = "light blue, red, orange, yellow, green, blue, purple, brown, black, white, grey, pink".split(", ")
HAIR = ("blond hair", "red hair", "curly hair", "white hair", "bald", "beard")
PAIRS = {  # names whose gender lies in the word itself: (role, gender)
    "merman": ("merperson", "male"),
    "mermaid": ("merperson", "female"),
    "prince": ("royal person", "male"),
    "princess": ("royal person", "female"),
    "person with crown": ("royal person", ""),
    "boy": ("child", "male"),
    "girl": ("child", "female"),
    "old man": ("old person", "male"),
    "old woman": ("old person", "female"),
    "older person": ("old person", ""),
    "deaf man": ("deaf person", "male"),
    "deaf woman": ("deaf person", "female"),
    "man": ("person", "male"),
    "woman": ("person", "female"),
    "pregnant man": ("pregnant person", "male"),
    "pregnant woman": ("pregnant person", "female"),
    "Santa Claus": ("Claus", "male"),
    "Mrs. Claus": ("Claus", "female"),
    "Mx Claus": ("Claus", ""),
}

# phrases that no rule finds; {with} becomes " with dark skin", {and} " and dark skin"; where there is
# neither, {with} comes last
SAID = {
    "Santa Claus": "Santa Claus",
    "Mrs. Claus": "Mrs. Claus",
    "Mx Claus": "Mx Claus",
    "person in suit levitating": "a person in a suit, levitating",
    "horse racing": "a jockey on a racing horse",
    "ear with hearing aid": "an ear with a hearing aid{and}",
    "selfie": "a hand{with} taking a selfie",
    "nail polish": "a hand{with} painting its nails",
    "writing hand": "a hand{with} writing",
    "hand with fingers splayed": "a hand with spread fingers{and}",
    "hand with index finger and thumb crossed": "a hand{with}, index finger and thumb crossed",
    "index pointing up": "an index finger{with} pointing up",
    "index pointing at the viewer": "an index finger{with} pointing at the viewer",
    "backhand index pointing left": "the back of a hand{with}, its index finger pointing left",
    "backhand index pointing right": "the back of a hand{with}, its index finger pointing right",
    "backhand index pointing up": "the back of a hand{with}, its index finger pointing up",
    "backhand index pointing down": "the back of a hand{with}, its index finger pointing down",
    "thumbs up": "a hand{with} giving a thumbs up",
    "thumbs down": "a hand{with} giving a thumbs down",
    "OK hand": "a hand{with} making the OK sign",
    "victory hand": "a hand{with} making the victory sign",
    "call me hand": "a hand{with} making the call me sign",
    "vulcan salute": "a hand{with} making the Vulcan salute",
    "love-you gesture": "a hand{with} making the love-you sign",
    "sign of the horns": "a hand{with} making the sign of the horns",
    "crossed fingers": "a hand with crossed fingers{and}",
    "pinched fingers": "a hand with pinched fingers{and}",
    "rightwards hand": "a hand{with} reaching to the right",
    "leftwards hand": "a hand{with} reaching to the left",
    "rightwards pushing hand": "a hand{with} pushing to the right",
    "leftwards pushing hand": "a hand{with} pushing to the left",
    "left-facing fist": "a fist{with} facing left",
    "right-facing fist": "a fist{with} facing right",
    "palm down hand": "a hand{with}, palm down",
    "palm up hand": "a hand{with}, palm up",
    "raised back of hand": "the back of a raised hand{with}",
    "palms up together": "two hands{with} together, palms up",
    "heart hands": "two hands{with} forming a heart",
    "raising hands": "two raised hands{with}",
    "flexed biceps": "a flexed biceps",
    "airplane arrival": "an airplane landing",
    "airplane departure": "an airplane taking off",
    "hourglass done": "an hourglass that has run out",
    "hourglass not done": "an hourglass that is still running",
    "construction": "a construction barrier",
    "flag in hole": "a flag in a golf hole",
    "dashing away": "a puff of dust",
    "dizzy": "a dizzy star",
    "hundred points": "a mark of one hundred points",
    "skull and crossbones": "a skull and crossbones",
    "antenna bars": "a sign with antenna bars",
    "cinema": "a cinema sign",
    "mobile phone off": "a mobile phone off sign",
    "vibration mode": "a vibration mode sign",
    "wireless": "a wireless sign",
    "performing arts": "two theatre masks",
    "om": "an om symbol",
    "yin yang": "a yin yang symbol",
    "latin cross": "a Latin cross",
    "hindu temple": "a Hindu temple",
    "shinto shrine": "a Shinto shrine",
    "dotted six-pointed star": "a six-pointed star with a dot",
    "place of worship": "a sign for a place of worship",
    "wheel of dharma": "a wheel of dharma",
    "star of David": "a star of David",
    "kaaba": "the Kaaba",
    "pouring liquid": "a glass pouring liquid",
    "baggage claim": "a baggage claim sign",
    "customs": "a customs sign",
    "left luggage": "a left luggage sign",
    "men's room": "a sign for the men's room",
    "women's room": "a sign for the women's room",
    "passport control": "a passport control sign",
    "potable water": "a drinking water sign",
    "restroom": "a restroom sign",
    "litter in bin sign": "a sign to put litter in its bin",
    "glasses": "a pair of glasses",
    "sunglasses": "a pair of sunglasses",
    "goggles": "a pair of goggles",
    "gloves": "a pair of gloves",
    "jeans": "a pair of jeans",
    "shorts": "a pair of shorts",
    "briefs": "a pair of briefs",
    "socks": "a pair of socks",
    "ballet shoes": "a pair of ballet shoes",
    "skis": "a pair of skis",
    "scissors": "a pair of scissors",
    "chopsticks": "a pair of chopsticks",
    "maracas": "a pair of maracas",
    "canned food": "canned food",
    "cooking": "a fried egg in a pan",
    "leafy green": "leafy greens",
    "Statue of Liberty": "the Statue of Liberty",
    "Tokyo tower": "the Tokyo Tower",
    "mount fuji": "Mount Fuji",
    "building construction": "a building under construction",
    "wedding": "a wedding chapel",
    "wood": "a pile of wood",
    "chart decreasing": "a chart with a falling line",
    "chart increasing": "a chart with a rising line",
    "chart increasing with yen": "a chart with a rising line and a yen sign",
    "foggy": "a foggy bridge",
    "night with stars": "a night with stars",
    "sunrise over mountains": "a sunrise over mountains",
    "camping": "a campsite",
    "beach with umbrella": "a beach with an umbrella",
    "rolling on the floor laughing": "a face rolling on the floor laughing",
    "speaker high volume": "a speaker at high volume",
    "speaker low volume": "a speaker at low volume",
    "speaker medium volume": "a speaker at medium volume",
    "heart exclamation": "an exclamation mark with a heart",
    "heart decoration": "a heart decoration",
    "biohazard": "a biohazard sign",
    "children crossing": "a children crossing sign",
    "no bicycles": "a no bicycles sign",
    "no entry": "a no entry sign",
    "no littering": "a no littering sign",
    "no mobile phones": "a no mobile phones sign",
    "no pedestrians": "a no pedestrians sign",
    "no smoking": "a no smoking sign",
    "non-potable water": "a sign for non-drinking water",
    "prohibited": "a prohibition sign",
    "radioactive": "a radioactivity sign",
    "warning": "a warning sign",
    "red triangle pointed down": "a red triangle pointing down",
    "red triangle pointed up": "a red triangle pointing up",
    "page facing up": "a page facing up",
    "page with curl": "a page with a curl",
    "flower playing cards": "a flower playing card",
    "leaf fluttering in wind": "a leaf fluttering in the wind",
    "camera with flash": "a camera with a flash",
    "magnifying glass tilted left": "a magnifying glass tilted to the left",
    "magnifying glass tilted right": "a magnifying glass tilted to the right",
    "check box with check": "a check box with a check mark",
    "Japanese symbol for beginner": "the Japanese symbol for a beginner",
    "counterclockwise arrows button": "a button with counterclockwise arrows",
    "high voltage": "a lightning bolt",
    "milky way": "the Milky Way",
    "sun behind cloud": "a sun behind a cloud",
    "sun behind large cloud": "a sun behind a large cloud",
    "sun behind rain cloud": "a sun behind a rain cloud",
    "sun behind small cloud": "a sun behind a small cloud",
    "umbrella on ground": "an umbrella on the ground",
    "sun with face": "a sun with a face",
    "face with head-bandage": "a face with a bandage around its head",
    "face with medical mask": "a face with a medical mask",
    "face with thermometer": "a face with a thermometer",
    "face vomiting": "a vomiting face",
    "globe showing Americas": "a globe showing the Americas",
    "globe showing Asia-Australia": "a globe showing Asia and Australia",
    "globe showing Europe-Africa": "a globe showing Europe and Africa",
    "headphone": "a pair of headphones",
    "divide": "a division sign",
    "minus": "a minus sign",
    "multiply": "a multiplication sign",
    "plus": "a plus sign",
    "infinity": "an infinity sign",
    "currency exchange": "a currency exchange sign",
    "dotted line face": "a face with a dotted outline",
    "face exhaling": "an exhaling face",
    "face in clouds": "a face in clouds",
    "face holding back tears": "a face holding back tears",
    "face with steam from nose": "a face with steam from its nose",
    "money with wings": "banknotes with wings",
    "black large square": "a large black square",
    "white large square": "a large white square",
    "woman's clothes": "women's clothes",
    "couch and lamp": "a couch and a lamp",
    "fork and knife": "a fork and a knife",
    "hammer and pick": "a hammer and a pick",
    "hammer and wrench": "a hammer and a wrench",
    "nut and bolt": "a nut and a bolt",
    "meat on bone": "meat on a bone",
    "mahjong red dragon": "a mahjong tile with a red dragon",
    "face with raised eyebrow": "a face with a raised eyebrow",
    "face without mouth": "a face without a mouth",
    "smiling face with halo": "a smiling face with a halo",
    "smiling face with tear": "a smiling face with a tear",
    "star-struck": "a star-struck face",
    "face with hand over mouth": "a face with a hand over its mouth",
    "face with open eyes and hand over mouth": "a face with open eyes and a hand over its mouth",
    "face with peeking eye": "a face peeking through its fingers",
    "face with monocle": "a face with a monocle",
    "face with open mouth": "a face with an open mouth",
    "face with diagonal mouth": "a face with a diagonal mouth",
    "frowning face with open mouth": "a frowning face with an open mouth",
    "face with tongue": "a face sticking out its tongue",
    "squinting face with tongue": "a squinting face sticking out its tongue",
    "winking face with tongue": "a winking face sticking out its tongue",
    "cat with wry smile": "a cat with a wry smile",
    "eye in speech bubble": "an eye in a speech bubble",
    "key": "a key",
    "locked": "a closed padlock",
    "locked with key": "a closed padlock with a key",
    "locked with pen": "a closed padlock with a pen",
    "unlocked": "an open padlock",
    "mobile phone with arrow": "a mobile phone with an arrow",
    "envelope with arrow": "an envelope with an arrow",
    "heart with arrow": "a heart with an arrow",
    "heart with ribbon": "a heart with a ribbon",
    "bell with slash": "a crossed out bell",
    "bottle with popping cork": "a bottle with a popping cork",
    "cup with straw": "a cup with a straw",
    "teacup without handle": "a teacup without a handle",
    "bowl with spoon": "a bowl with a spoon",
    "fork and knife with plate": "a plate with a fork and a knife",
    "house with garden": "a house with a garden",
    "notebook with decorative cover": "a notebook with a decorative cover",
    "closed mailbox with raised flag": "a closed mailbox with a raised flag",
    "closed mailbox with lowered flag": "a closed mailbox with a lowered flag",
    "open mailbox with raised flag": "an open mailbox with a raised flag",
    "open mailbox with lowered flag": "an open mailbox with a lowered flag",
    "ballot box with ballot": "a ballot box with a ballot",
    "fish cake with swirl": "a fish cake with a swirl",
    "cloud with lightning": "a cloud with lightning",
    "light rail": "a light rail train",
    "metro": "a metro train",
    "american football": "an American football",
    "badminton": "a badminton racket and a shuttlecock",
    "bowling": "a bowling ball with pins",
    "cricket game": "a cricket bat and a ball",
    "field hockey": "a field hockey stick and a ball",
    "ice hockey": "an ice hockey stick and a puck",
    "lacrosse": "a lacrosse stick and a ball",
    "ping pong": "a ping pong paddle and a ball",
    "tennis": "a tennis racket and a ball",
    "diamond suit": "the diamond suit of playing cards",
    "club suit": "the club suit of playing cards",
    "heart suit": "the heart suit of playing cards",
    "spade suit": "the spade suit of playing cards",
    "ferris wheel": "a Ferris wheel",
    "mate": "a cup of mate",
    "ice": "an ice cube",
    "link": "a link of a chain",
    "soap": "a bar of soap",
    "thread": "a spool of thread",
    "yarn": "a ball of yarn",
    "butter": "a piece of butter",
    "salt": "a shaker of salt",
    "popcorn": "a box of popcorn",
    "candy": "a piece of candy",
    "garlic": "a bulb of garlic",
    "ginger root": "a ginger root",
    "sake": "a bottle of sake",
    "luggage": "a suitcase",
    "dna": "a strand of DNA",
    "dvd": "a DVD",
    "beans": "beans",
    "eye": "an eye",
    "eyes": "two eyes",
}
# names without an article: what is not counted
UNCOUNTED = set(
    "bacon, baguette bread, bread, broccoli, bubble tea, cooked rice, coral, curry rice, custard, dango, flatbread, "
    "fog, oden, shaved ice, soft ice cream, spaghetti, stuffed flatbread, sushi".split(", ")
)
SINGULAR = {"rhinoceros"}  # one, though its name ends in s
# other words for the same thing; many are character names of Unicode or shortcodes of emojibase
ALSO = {
    "automobile": "a car",
    "oncoming automobile": "an oncoming car",
    "sport utility vehicle": "a jeep",
    "locomotive": "a steam locomotive",
    "articulated lorry": "a truck with a trailer",
    "motor scooter": "a moped",
    "auto rickshaw": "a tuk-tuk",
    "fire engine": "a fire truck",
    "bicycle": "a bike",
    "airplane": "a plane",
    "police car light": "a siren",
    "passenger ship": "a cruise ship",
    "flying saucer": "a UFO",
    "television": "a TV",
    "flashlight": "an electric torch",
    "glasses": "a pair of eyeglasses",
    "running shoe": "a sneaker",
    "backpack": "a school bag",
    "clutch bag": "a pouch",
    "gem stone": "a gem",
    "thong sandal": "a flip-flop",
    "billed cap": "a baseball cap",
    "honeybee": "a bee",
    "lady beetle": "a ladybug",
    "hippopotamus": "a hippo",
    "two-hump camel": "a camel with two humps",
    "camel": "a dromedary",
    "cricket": "a grasshopper",
    "baby chick": "a chick",
    "blowfish": "a pufferfish",
    "spiral shell": "a seashell",
    "sauropod": "a long-necked dinosaur",
    "T-Rex": "a tyrannosaurus",
    "ear of corn": "a corn cob",
    "hot pepper": "a chili pepper",
    "eggplant": "an aubergine",
    "peanuts": "nuts",
    "tangerine": "a mandarin",
    "kiwi fruit": "a kiwi",
    "red apple": "an apple",
    "hamburger": "a burger",
    "french fries": "fries",
    "doughnut": "a donut",
    "pancakes": "a stack of pancakes",
    "shallow pan of food": "a paella",
    "custard": "a pudding",
    "steaming bowl": "a bowl of ramen",
    "hot beverage": "a cup of coffee",
    "glass of milk": "milk",
    "cocktail glass": "a cocktail",
    "wine glass": "a glass of wine",
    "beer mug": "a mug of beer",
    "tumbler glass": "a glass of whisky",
    "beverage box": "a juice box",
    "bottle with popping cork": "a bottle of champagne",
    "mobile phone": "a cell phone",
    "telephone receiver": "a phone receiver",
    "computer mouse": "a mouse for a computer",
    "desktop computer": "a computer",
    "optical disk": "a CD",
    "magnifying glass tilted left": "a magnifier",
    "light bulb": "a lamp",
    "locked": "a lock",
    "wastebasket": "a trash can",
    "shopping cart": "a shopping trolley",
    "roll of paper": "a roll of toilet paper",
    "carpentry saw": "a saw",
    "pick": "a pickaxe",
    "dagger": "a knife",
    "boxing glove": "a glove for boxing",
    "soccer ball": "a football",
    "bullseye": "a dartboard",
    "water pistol": "a toy gun",
    "pool 8 ball": "a billiard ball",
    "teddy bear": "a toy bear",
    "performing arts": "theatre masks",
    "framed picture": "a painting in a frame",
    "wrapped gift": "a present",
    "jack-o-lantern": "a Halloween pumpkin",
    "admission tickets": "tickets",
    "trophy": "a golden cup",
    "1st place medal": "a gold medal",
    "2nd place medal": "a silver medal",
    "3rd place medal": "a bronze medal",
    "collision": "an explosion",
    "droplet": "a drop of water",
    "high voltage": "a flash of lightning",
    "water wave": "a wave",
    "fire": "a flame",
    "tornado": "a whirlwind",
    "ringed planet": "Saturn",
    "globe with meridians": "a globe with lines",
    "snow-capped mountain": "a mountain with snow",
    "desert island": "an island with a palm tree",
    "deciduous tree": "a leafy tree",
    "evergreen tree": "a fir tree",
    "four leaf clover": "a lucky clover",
    "seedling": "a young plant",
    "cherry blossom": "a pink blossom",
    "wilted flower": "a wilted rose",
    "sheaf of rice": "an ear of rice",
    "house": "a home",
    "derelict house": "an abandoned house",
    "convenience store": "a shop that is always open",
    "ferris wheel": "a big wheel",
    "couch and lamp": "a sofa and a lamp",
    "bathtub": "a tub",
    "adhesive bandage": "a plaster for a wound",
    "red heart": "a heart",
    "robot": "a robot face",
    "alien monster": "a space invader",
    "ogre": "a Japanese ogre",
    "goblin": "a Japanese goblin",
    "loudly crying face": "a sobbing face",
    "enraged face": "a pouting red face",
    "face savoring food": "a face that likes its food",
    "thinking face": "a pondering face",
    "sleeping face": "a snoring face",
    "nerd face": "a face with glasses and big teeth",
    "smiling face with sunglasses": "a cool face",
    "smiling face with heart-eyes": "a face in love",
    "face with tears of joy": "a face laughing with tears",
    "money-mouth face": "a face with money in its mouth",
    "zipper-mouth face": "a face with a zipped mouth",
    "cowboy hat face": "a cowboy",
    "partying face": "a face at a party",
    "smiling face with horns": "a smiling devil",
    "smiling face with halo": "an angel's face",
    "flexed biceps": "a strong arm{with}",
    "folded hands": "praying hands{with}",
    "clapping hands": "applause by hands{with}",
    "raised hand": "a palm{with}, held up",
    "oncoming fist": "a punch by a fist{with}",
    "waving hand": "a hand{with} waving hello",
    "old woman": "a grandma{with}",
    "old man": "a grandpa{with}",
    "health worker": "a doctor{with}",
    "cook": "a chef{with}",
    "detective": "a sleuth{with}",
    "mage": "a wizard{with}",
    "police officer": "a cop{with}",
    "baby": "an infant{with}",
    "child": "a kid{with}",
    "person surfing": "a surfer{with}",
    "person swimming": "a swimmer{with}",
    "person running": "a runner{with}",
    "person biking": "a cyclist{with}",
    "person golfing": "a golfer{with}",
    "person climbing": "a climber{with}",
    "person juggling": "a juggler{with}",
    "person lifting weights": "a weight lifter{with}",
    "person rowing boat": "a rower{with}",
    "person bouncing ball": "a basketball player{with}",
    "person playing handball": "a handball player{with}",
    "person mountain biking": "a mountain biker{with}",
    "woman dancing": "a dancing woman{with}",
    "man dancing": "a dancing man{with}",
    "bust in silhouette": "the outline of a person",
}
INNER = (  # articles that a name leaves out
    (r"\bin (tuxedo|suit|steamy room|motorized wheelchair|manual wheelchair)", r"in a \1"),
    (r"\bin lotus position", "in the lotus position"),
    (r"\bwith (crown|skullcap|headscarf|veil|white cane)", r"with a \1"),
    (r"\b(wearing|getting|taking|rowing|bouncing|feeding) (\w+)", r"\1 a \2"),
    (r"\b(tipping|raising) hand", r"\1 a hand"),
    (r"\bgesturing (NO|OK)", r"making the \1 gesture"),
)


HEAD = re.compile(r" (?:with|of|in|on|to|behind|pointing|showing|for|from|without|at|before|tilted|curving) ")


def with_article(words):
    "a or an by sound; nothing before many things, and before what is not counted."
    head = HEAD.split(words)[0].split()[-1]
    many = head.endswith("s") and not head.endswith(("ss", "us", "is")) and head not in SINGULAR
    if many or words in UNCOUNTED:
        return words
    hard = re.match(r"(?i)uni|use|euro|ewe|one\b|one-|u-", words)
    soft = re.match(r"(?i)hour|x-|mx|[fx]-", words)
    return f"{'an' if soft or not hard and words[0] in 'aeiouAEIOU' else 'a'} {words}"


def _person(name):
    "A phrase about people, with a place for the skin."
    who, _, rest = name.partition(" ")
    kind = who.rstrip(":")
    if kind not in WHO or not rest:
        return ""
    noun = kind if kind in ("people", "men", "women") else f"a {kind}"
    if who.endswith(":"):
        if rest == "bald":
            return f"a bald {kind}"
        return f"{noun} with {'a beard' if rest == 'beard' else rest}{{and}}"
    for found, said in INNER:
        rest = re.sub(found, said, rest)
    if rest.startswith("with "):
        return f"{noun} {rest}{{and}}"
    if rest.startswith(("in ", "mountain ")) or rest.split()[0].endswith("ing"):
        return f"{noun}{{with}} {rest}"
    return f"{noun} {rest}"


def words_of(name):
    "A name without curly marks."
    return name.replace("’", "'").replace("ñ", "n")


def phrase_of(name, subgroup):
    "What stands in a caption for a name, with a place for the skin."
    if subgroup == "zodiac":
        return f"the zodiac sign {name}"
    return SAID.get(name) or _person(name) or with_article(name)


def others_of(name, phrase):
    "Other words for the same thing."
    found = re.fullmatch(r"a (man|woman) (?!with |in )([a-z ]+)", phrase)
    other = [f"a {WHO[found[1]]} {found[2]}"] if found else []
    return [*other, *filter(None, [ALSO.get(name)])]


def fill(phrase, tone):
    "A phrase with its skin."
    if "{" not in phrase:
        phrase += "{with}"
    skin = f"{tone} skin" if tone else ""
    return phrase.format(**{w: skin and f" {w} {skin}" for w in ("with", "and")})


def _parts_of_person(name):
    "Role, gender and hair."
    if name in PAIRS:
        role, gender = PAIRS[name]
        return {"role": role, "gender": gender}
    who, _, rest = name.partition(" ")
    kind = who.rstrip(":")
    if kind not in WHO or not rest:
        return {"role": name}
    if rest not in HAIR:
        return {"role": rest, "gender": WHO[kind]}
    role = "bald person" if rest == "bald" else f"person with {rest}"
    return {"role": role, "gender": WHO[kind], "hair": rest}


def parts_of(name, subgroup, tone, toned):
    "What a name is made of; parts that it lacks are left out. Whatever has tones has a role."
    if subgroup.startswith("person"):
        parts = _parts_of_person(name)
    elif subgroup.startswith("hand") or toned:
        parts = {"role": name}
    else:
        colour = next((c for c in COLOURS if name.startswith(f"{c} ")), "")
        parts = {"object": name.removeprefix(colour).strip(), "colour": colour}
    return {k: v for k, v in {**parts, "tone": tone}.items() if v}
