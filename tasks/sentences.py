"""The sentences of the stories, and what may be said in them.

They are written as if the hero were Tom, his friend Anna and the thing a red kite: what stands in
{braces} is an example of a fact, [this|that] is a choice of words that says nothing, and an empty
sentence means that the stage of the plot may be left out. 228 sentences, 393 with their choices.
"""
from __future__ import annotations

# ------------------------------------------------------------------ the facts
BOYS = "Tom Ben Max Leo Sam Jack Finn Noah Paul Hugo Oscar Theo".split()
GIRLS = "Anna Lily Mia Ella Nora Rosa Emma Lucy Zoe Ida Clara Ruth".split()
NAMES = BOYS + GIRLS
COLOURS = "red blue green yellow white black pink brown purple grey".split()
ELDERS = "grandmother grandfather mother father aunt uncle".split()
PLACES = ["the park", "the garden", "the beach", "the forest", "the meadow", "the market",
          "the hill", "the playground", "the orchard", "the farm"]
SPOTS = ["under the bench", "by the gate", "behind the hedge", "on the wall", "under the oak",
         "behind the shed", "beside the path", "in the tall grass", "by the fence", "on the steps"]
FACTS = {  # example: (kind of the violation where it changes, what it may be)
    "Tom": ("name", NAMES),
    "Anna": ("name", NAMES),
    "friend": ("name", ["friend", "cousin", "neighbour"]),
    "grandmother": ("name", ELDERS),  # who gave the thing
    "mother": ("name", ELDERS),  # who is at home
    "red": ("colour", COLOURS),
    "blue": ("colour", COLOURS),
    "kite": ("thing", "kite drum boat doll bell basket cup whistle lantern puppet flute train robot"
                      " wagon".split()),
    "bun": ("thing", "bun pear plum carrot cookie cherry nut".split()),
    "fox": ("animal", "fox dog cat crow goat monkey rabbit mouse".split()),
    "duck": ("animal", "duck frog swan turtle beaver goose".split()),
    "the park": ("place", PLACES),
    "the hill": ("place", PLACES),  # where the hero lives
    "the pond": ("place", ["the pond", "the lake", "the river", "the stream", "the canal"]),
    "under the bench": ("place", SPOTS),
    "by the gate": ("place", SPOTS)}
SEXES = "boy", "girl"
PRONOUNS = {"he": ("Tom", "he", "she"), "his": ("Tom", "his", "her"), "him": ("Tom", "him", "her"),
            "boy": ("Tom", "boy", "girl"), "she": ("Anna", "he", "she"),
            "her": ("Anna", "his", "her")}  # example: (who, the word for a boy, for a girl)
DIFFERENT = {"Tom": "Anna", "red": "blue", "under the bench": "by the gate"}
DIFFERENT |= {two: one for one, two in DIFFERENT.items()}
# What our stories have alike and others need not: an uncle gave it, and a mother hears of it
ALIKE = {"mother": "grandmother", "the hill": "the park"}

# ------------------------------------------------------------------ the sentences
BRIDGE = (  # after a beginning that none of these sentences would have
    "But that is another story.", "But this story is about [somebody|someone] else.",
    "[Nobody|No one] knows how that ended.", "That is a story for another day.")
OPEN = (
    "", "Once upon a time[,|] there was a [little |kind |quiet |brave |]{boy} named {Tom}.",
    "Once upon a time[,|] there lived a [little |happy |]{boy} [named|called] {Tom}.",
    "[Once|Long ago|A long time ago][,|] there was a [little |kind |brave |]{boy} named {Tom}.",
    "There was [once |]a [little |kind |happy |]{boy} [named|called] {Tom}.",
    "In a [small|quiet|sunny] [town|village], there lived a {boy} named {Tom}.",
    "{Tom} was a [kind|brave|cheerful|curious] [little|young] {boy}.",
    "A [little |young |]{boy} named {Tom} lived near {the hill}.",
    "{Tom} lived with {his} {mother} near {the hill}.",
    "One [day|morning], a [little |]{boy} named {Tom} [woke up early|looked out of the window].",
    "The [little |]{boy} in this story was called {Tom}.",
    "This is the story of a [little |brave |]{boy} named {Tom}.")
OWN = (
    "{Tom} had a {red} {kite}.",
    "{He} had a {red} {kite} that {he} loved [very much|more than anything].",
    "{His} {grandmother} had given {him} a {red} {kite}.",
    "On {his} birthday, {his} {grandmother} gave {him} a {red} {kite}.",
    "[Every day|All day long|Each morning], {Tom} played with {his} {red} {kite}.",
    "{He} was [very |so |]proud of {his} [new |old |]{red} {kite}.",
    "Nobody had a [finer|nicer|prettier] {kite} than {Tom}, and it was {red}.",
    "{Tom}'s {kite} was {red}, and {he} took it everywhere.",
    "Of all {his} things, {he} liked {his} {red} {kite} best.")
FRIEND = (
    "{His} {friend} {Anna} lived [next door|across the street|nearby].",
    "{He} often played with {his} {friend} {Anna}.",
    "{Anna} was {his} {friend}, and {she} liked the {kite} too.",
    "{His} [best |dear |]{friend} was called {Anna}.", "{Tom} had a {friend} named {Anna}.")
GO = (
    "One [sunny |windy |cold |fine |]day, {Tom} took the {kite} to {the park}.",
    "[On Sunday|In spring|One morning], {Tom} carried the {kite} to {the park}.",
    "The sun was shining, so {he} went to {the park} with the {red} {kite}.",
    "One [afternoon|morning], {he} walked to {the park}, and the {kite} came along.")
MEET = (
    "One [sunny |windy |fine |]day, {Tom} and {his} {friend} {Anna} went to {the park}.",
    "On the way to {the park}, {Tom} met {his} {friend} {Anna}.",
    "\"Let us go to {the park},\" said {his} {friend} {Anna} [one day|one morning].",
    "[On Sunday|In spring|One day], {he} took it to {the park} with {his} {friend} {Anna}.",
    "{His} {friend} {Anna} came, and they carried the {kite} to {the park}.")
SAD = (
    "", "{Tom} was [very |so |]sad.", "{He} [began to cry|cried and cried|could not stop crying].",
    "\"Oh no, my {red} {kite}!\" cried {Tom}.", "{Tom} did not know what to do.",
    "Big tears ran down {his} face.", "\"My {grandmother} gave it to me,\" {he} said sadly.")
COMFORT = (
    "", "\"Do not [cry|worry|be sad], {Tom},\" said {Anna}.", "{Anna} took {his} hand.",
    "\"I will help you, {Tom},\" said {Anna}.", "{Anna} saw that {Tom} was sad.",
    "But {Anna} only smiled, for {she} had an idea.")
THANKS = (
    "", "\"Thank you, {Anna},\" said {Tom}.", "{Tom} hugged {Anna} and [laughed|smiled].",
    "\"You are a good {friend}, {Anna},\" said {Tom}.", "{Tom} jumped for joy, and {Anna} laughed.",
    "{Tom} was so happy that {he} [danced|sang|clapped {his} hands].")
END = (
    "From then on, {he} took good care of {his} {red} {kite}.",
    "After that day, {Tom} never let go of {his} {red} {kite} again.",
    "That night, {Tom} slept with the {red} {kite} beside {him}.",
    "{Tom} went home and told {his} {mother} all about it.",
    "And {Tom} loved {his} {red} {kite} more than ever.")
END_TWO = END + (
    "{Tom} and {Anna} played with the {red} {kite} until [it was dark|the sun went down].",
    "Then {Tom} and {Anna} went home, and {he} carried the {red} {kite}.",
    "So {Tom} had {his} {red} {kite} again, and {Anna} was glad.")
PLOTS = {
    "lost": (BRIDGE, OPEN, OWN, MEET, (
        "{Tom} put the {kite} {under the bench} and [ran off to play|climbed a tree].",
        "{Tom} left {his} {kite} {under the bench} while they [played tag|picked flowers].",
        "There {Tom} laid the {red} {kite} {under the bench} and played with {Anna}.",
        "{Tom} wanted to [climb|run|dance], so {he} put {his} {kite} {under the bench}.",
        "\"Nobody will take it here,\" said {Tom}, and put the {kite} {under the bench}."), (
        "When {Tom} came home, {his} {kite} was [gone|not there].",
        "In the evening, {Tom} could not find {his} {red} {kite}.",
        "Back home, {Tom} saw that {he} had forgotten the {red} {kite}.",
        "At bedtime, {Tom} looked for the {kite}, but it was not there.",
        "They went home for supper, and {Tom} forgot {his} {kite}."), SAD, COMFORT, (
        "\"Let us go back to {the park},\" said {Anna}.",
        "So {Tom} and {Anna} ran back to {the park}.",
        "In the morning, {Anna} went back to {the park} with {Tom}.",
        "Together they searched all over {the park}."), (
        "There was the {red} {kite}, {under the bench}, where {Tom} had put it.",
        "{Anna} looked {under the bench} and found the {red} {kite}.",
        "The {kite} was still [lying |waiting |]{under the bench}.",
        "At last {she} found {Tom}'s {kite} {under the bench}.",
        "\"Here it is, {under the bench}!\" called {Anna}."), THANKS, END_TWO),
    "broken": (BRIDGE, OPEN, OWN, MEET, (
        "{Tom} ran too fast and fell, and the {red} {kite} broke.",
        "On the way, {Tom} tripped over a [stone|root|stick], and the {kite} broke.",
        "{Tom} dropped the {red} {kite} on a stone, and it broke [in two|to pieces].",
        "Suddenly there was a crack, and {Tom}'s {kite} was broken."), SAD, COMFORT, (
        "\"I can mend it,\" said {Anna}.",
        "\"Give me the {red} {kite} and I will mend it,\" said {Anna}.",
        "{Anna} ran home to get some [glue|string|tape].",
        "{Anna} picked up the pieces of {Tom}'s {kite}.",
        "At home, {Anna} asked {her} father for [glue|string|tape]."), (
        "{She} worked until evening, and the {red} {kite} was whole again.",
        "With [glue|string|tape] and clever hands, {she} mended {Tom}'s {kite}.",
        "Piece by piece, {Anna} put the {red} {kite} together again.",
        "Soon {she} had made the {red} {kite} as good as new."), THANKS, END_TWO),
    "wet": (BRIDGE, OPEN, OWN, (
        "One [sunny |windy |cold |fine |]day, {he} took it to {the pond}.",
        "One [afternoon|morning], {Tom} walked along {the pond} with {his} {kite}.",
        "{He} liked to sit by {the pond} with the {red} {kite}."), (
        "{He} slipped, and the {red} {kite} fell into {the pond}.",
        "The wind pushed {him}, and {his} {kite} fell into {the pond}.",
        "With a big splash, {Tom}'s {kite} fell into {the pond}.",
        "{He} leaned over too far, and splash, the {red} {kite} was in the water."), SAD, (
        "Just then, a [little |friendly |]{duck} came by.", "A [little |big |]{duck} heard {him}.",
        "\"Can I help you?\" asked a [little |friendly |]{duck}."), (
        "", "\"My {red} {kite} fell into {the pond},\" said {Tom}.",
        "{Tom} told the {duck} about {his} {red} {kite}.",
        "{He} pointed at {the pond}, and the {duck} nodded."), (
        "The {duck} dived into {the pond} and brought back the {red} {kite}.",
        "The {duck} swam fast and pulled {Tom}'s {kite} out of {the pond}.",
        "Down went the {duck}, and it came up with the {red} {kite}.",
        "At once the {duck} fished the {kite} out of {the pond}."), (
        "", "\"Thank you, [dear|kind|good] {duck},\" said {Tom}.",
        "{Tom} [thanked|hugged] the wet {duck}.", "{Tom} gave the {duck} a {bun}."), END + (
        "After that, {Tom} and the {duck} were friends.",
        "Every day, {he} brought a {bun} to {the pond} for the {duck}.",
        "{He} dried the {red} {kite} in the sun and went home.")),
    "stolen": (BRIDGE, OPEN, OWN, GO, (
        "A {fox} came, took the {red} {kite} and ran away.",
        "When {he} looked away, a {fox} carried off {his} {kite}.",
        "Then a [sly|naughty|hungry] {fox} took {Tom}'s {kite} and ran away.",
        "Out of nowhere came a {fox} and ran off with the {red} {kite}."), SAD, (
        "{Tom} ran after the {fox} as fast as {he} could.",
        "\"Stop!\" cried {Tom}, but the {fox} did not stop.",
        "{Tom} followed the {fox} all over {the park}."), (
        "", "At last {he} found the {fox} {under the bench}.",
        "The {fox} sat down {under the bench} with the {red} {kite}.",
        "The {fox} hid {under the bench}, but {Tom} saw it."), (
        "", "\"I am [so |very |]hungry,\" said the {fox}.",
        "\"For a {bun} you get it back,\" said the {fox}.",
        "The {fox} was only hungry and wanted a {bun}."), (
        "So {Tom} gave the {fox} a {bun} and got the {red} {kite} back.",
        "{He} gave the {fox} a {bun}, and the {fox} gave {him} the {red} {kite}.",
        "For {his} last {bun}, {Tom} got {his} {kite} back.",
        "The {fox} ate a {bun} {under the bench} and gave {him} the {red} {kite}."), (
        "", "\"I am sorry, {Tom},\" said the {fox}.", "\"Next time, just ask,\" said {Tom}.",
        "The {fox} ate the {bun} and [smiled|was happy]."), END + (
        "{Tom} and the {fox} became friends.",
        "From that day on, {Tom} always had a {bun} for the {fox}.",
        "Now the {fox} and {Tom} play with the {red} {kite} together.")),
    "painted": (BRIDGE, OPEN, OWN, (
        "But {Tom} liked {blue} better than {red}.", "But {he} wished that it were {blue}.",
        "\"I wish my {kite} were {blue},\" said {Tom}."), (
        "{His} {friend} {Anna} had a pot of {blue} paint.",
        "\"I have some {blue} paint,\" said {his} {friend} {Anna}.",
        "{His} {friend} {Anna} came with a brush and {blue} paint."), (
        "So {Tom} and {Anna} painted the {red} {kite} {blue}.",
        "{Tom} took a brush and painted {his} {red} {kite} {blue}.",
        "{Anna} helped {him}, and the {red} {kite} turned {blue}."), (
        "{Tom} put the {blue} {kite} {under the bench} to dry.",
        "They left it {under the bench} to dry in the sun.",
        "{Anna} carried the wet {kite} out and put it {under the bench}."), (
        "", "\"Do not touch it yet, {Tom},\" said {Anna}.",
        "\"Now it is {blue}!\" [cried|said] {Tom}.", "{Tom} could hardly wait."), (
        "The next morning, the {blue} {kite} was still {under the bench}, dry and bright.",
        "When it was dry, {Tom} found {his} {blue} {kite} {under the bench}.",
        "Soon the {kite} {under the bench} was dry, and how {blue} it was!"), THANKS, (
        "Now everybody knew {Tom}'s {blue} {kite}.",
        "{Tom} and {Anna} took the {blue} {kite} to {the park}.",
        "That night, {Tom} dreamed of {his} {blue} {kite}.",
        "{His} {mother} did not know {his} {blue} {kite} at first.")),
    "given": (BRIDGE, OPEN, OWN, (
        "{His} {friend} {Anna} had no {kite}.", "{His} {friend} {Anna} had lost {her} own {kite}.",
        "{Anna}, {his} {friend}, had never had a {kite}."), (
        "{Anna} was often [alone|sad].", "\"I wish I had one,\" said {Anna}.",
        "It was {Anna}'s birthday, but nobody had a present.",
        "One day, {Anna} sat near {the park} and looked sad."), (
        "", "{Tom} thought for a long time.", "{Tom} looked at {Anna} and then at {his} {kite}.",
        "\"{Anna} needs it more than I do,\" thought {Tom}."), (
        "{Tom} hid the {red} {kite} {under the bench} for {Anna}.",
        "Quietly {Tom} put the {red} {kite} {under the bench}.",
        "{Tom} tied a ribbon to {his} {kite} and put it {under the bench}."), (
        "", "\"Look {under the bench},\" said {Tom} to {Anna}.",
        "\"I have something for you, {Anna},\" said {Tom}.", "Then {Tom} called {Anna}."), (
        "{Anna} looked {under the bench} and found the {red} {kite}.",
        "There, {under the bench}, {she} saw the {red} {kite}.",
        "{Anna} ran and found {Tom}'s {kite} {under the bench}."), (
        "\"It is yours now, {Anna},\" said {Tom}.",
        "\"This {red} {kite} is for you,\" said {Tom}."), (
        "", "\"Thank you, {Tom},\" said {Anna}.", "{Anna} laughed and hugged {Tom}."), (
        "From then on it was {Anna}'s {kite}, and {Tom} was glad.",
        "Now {Anna} had a {red} {kite}, and {Tom} had a happy {friend}.",
        "That night, {Anna}'s {red} {kite} stood beside {her} bed.",
        "{Anna} let {Tom} play with {her} {red} {kite} whenever {he} came.")),
    "swapped": (BRIDGE, OPEN, OWN, (
        "{His} {friend} {Anna} had a {blue} {kite}.",
        "{Anna}, {his} {friend}, had a {kite} too, but it was {blue}.",
        "{His} {friend} was called {Anna}, and {Anna}'s {kite} was {blue}."), (
        "", "One [afternoon|morning|day], {Tom} and {Anna} went to {the park}.",
        "The next day, {Tom} met {Anna} on the way to {the park}.",
        "\"Let us go to {the park},\" said {Anna} one day."), (
        "{Anna} could not stop looking at {Tom}'s {red} {kite}.",
        "\"Your {blue} {kite} is [lovely|beautiful], {Anna},\" said {Tom}.",
        "\"I like your {red} {kite}, {Tom},\" said {Anna}."), (
        "", "\"Shall we swap?\" asked {Anna}.", "\"Shall we swap?\" asked {Tom}.",
        "\"Take my {red} {kite} and give me the {blue} one,\" said {Tom}.",
        "\"Take my {blue} {kite} and give me the {red} one,\" said {Anna}."), (
        "So {Tom} took the {blue} {kite}, and {Anna} took the {red} one.",
        "{Tom} gave {Anna} the {red} {kite} and got the {blue} one."), (
        "", "Now the {red} {kite} was {Anna}'s, and the {blue} one was {Tom}'s.",
        "{Tom} laughed, and {Anna} laughed too.", "\"Now I have a {blue} {kite}!\" cried {Tom}.",
        "\"Now I have a {red} {kite}!\" cried {Anna}."), (
        "{Tom} carried the {blue} {kite} home, and {Anna} carried the {red} one.",
        "Both were happy, {Tom} with the {blue} {kite} and {Anna} with the {red} one.",
        "That night, the {blue} {kite} stood by {Tom}'s bed and the {red} one by {Anna}'s.")),
    "hidden": (BRIDGE, OPEN, OWN, FRIEND, (
        "One day, {Anna} hid the {red} {kite} {under the bench}.",
        "\"Close your eyes,\" said {Anna}, and hid {Tom}'s {kite} {under the bench}.",
        "For fun, {Anna} took the {red} {kite} and hid it {under the bench}."), (
        "", "\"Now find it, {Tom}!\" called {Anna}.", "{Tom} counted to ten and began to search.",
        "\"Where is my {red} {kite}?\" asked {Tom}."), (
        "{Tom} looked {by the gate}, but there was nothing.",
        "\"Is it {by the gate}?\" asked {Tom}, but it was not there.",
        "First {Tom} searched {by the gate}, but no {kite} was there."), (
        "", "\"Cold, very cold,\" laughed {Anna}.", "{Anna} [laughed|giggled] behind {her} hand.",
        "\"Try again, {Tom},\" said {Anna}."), (
        "Then {he} looked {under the bench}, and there was {his} {red} {kite}.",
        "At last {Tom} found the {red} {kite} {under the bench}.",
        "\"It is {under the bench}!\" cried {Tom}, and {he} was right."), (
        "", "Then {Tom} hid it {by the gate}, and {Anna} found it there.",
        "\"Now it is your turn, {Anna},\" said {Tom}.", "\"Well done, {Tom},\" said {Anna}."),
        END_TWO)}
