"""What a Chinese follow-up refers to, by rules: ellipses (“意大利呢？”) and pronouns (“它的人口”).

In: a question and the turn before it. Out: the question as it would stand alone, or the question itself where no rule
is sure. What a pronoun means is what the earlier question is about: the words before its first 的 or its verb.
Not covered: references to what an answer said, text without a topic at its head.
"""

from __future__ import annotations

import re

from serving.earlier_turn import Earlier

_END = r"[\s？?。！!…]*$"
_LEAD = re.compile(r"^(?:(?:那么|那|而|但是|但|还有|另外|以及|请问|所以|然后)[，,\s]*)+")
# Nouns that are asked of a thing, and so are not a thing themselves.
_COUNTED = (
    r"(?:人口|面积|价格|长度|高度|宽度|深度|重量|温度|数量|年龄|年纪|GDP|国内生产总值|寿命|费用|成本|海拔|收入|预算|速度|"
    r"时长|期限|保修期|剂量|用量|密度|增长率|失业率|识字率|出生率|死亡率|产量|价钱|尺寸|电压|容量|体积|距离|身高|体重)"
)
_PEOPLE = (
    r"(?:总统|总理|首相|国王|女王|主席|领导人|元首|作者|创始人|首席执行官|CEO|市长|院长|校长|负责人|发明者|皇帝|教皇)"
)
_ATTRIBUTES = (
    r"(?:首都|货币|语言|官方语言|气候|地理|位置|经济|历史|文化|宗教|出口|进口|出口产品|资源|自然资源|边界|邻国|海岸线|政体|"
    r"国旗|国歌|国花|时区|首府|民族|节日|颜色|用法|副作用|不良反应|禁忌|症状|治疗|治疗方法|病因|成分|功能|特点|优点|缺点|"
    r"原因|流程|步骤|地址|电话|日期|名字|名称|职业|作用|用途|原理|含义|保修|保修政策|配件|型号|适应症|预防|预防方法|"
    r"官网|首都城市|主要城市|最大城市|地形|政府|议会|国庆日|独立日|电话区号)"
)
# Endings of common nouns: what ends so and is not in the lists above may be either, so nothing is concluded.
_NOUN_ENDINGS = frozenset(
    "率量度费法者力性物期价数额长点名号间语言教史化候济口积币线源旗歌花章权业品路军队节食制体策律规应症用能分骤程险址话式色寸级们样"
)
_NO_TOPIC = re.compile(
    r"你|我|您|咱|如何|请|能否|是否|帮|什么|谁|哪|怎|为何|为什么|多少|几|呢|吗|还|然后|后来|其他|其它|别的|这|那|现在|今天|明天|昨天"
)
_PRONOUN = re.compile(
    r"它们的|他们的|她们的|它的|他的|她的|它们|他们|她们|它|(?<![其吉])他|她|"
    r"该(?:国|市|公司|产品|药|药物|地区|机构|组织|型号|设备)|"
    r"[这那](?:个国家|座城市|个城市|个地方|家公司|款产品|个产品|种药|种药物|种病|种疾病|个人|位总统|本书|部电影|款手机)|"
    r"那里|那儿|当地"
)
_ITS = re.compile(r"^(?:[那而请问，,]*)其(?![他它中实余次间])")
# What may stand before a pronoun that refers to an earlier turn: nothing that it could refer to itself.
_BEFORE_PRONOUN = re.compile(
    r"^(?:那么|那|而|但是|但|还有|另外|以及|请问|所以|然后|现在|，|,|\s|请|介绍一下|说说|告诉我|讲讲|如何|怎么|怎样|为什么|为何|"
    r"什么时候|何时|哪一年|谁是|是谁|谁|有多少人|有哪些国家|哪些国家|哪个国家|哪些|什么|有|多少|几个|能不能|可以|是否|与|和|跟|在|"
    r"使用|服用|领导|发明|创立|创建|建立|属于|治疗|预防|住在|生活在|到|去|对|关于|了|的)*$"
)
_YEAR = re.compile(r"(?:公元)?(?:\d{2,4}|[一二三四五六七八九零〇]{4})年(?:代)?|去年|今年|前年|明年|\d+世纪|上个?世纪")
_VERB = (
    r"(?:有|是|在|位于|属于|使用|采用|说(?:什么|哪)|何时|什么时候|哪|多大|多高|多长|多少|多久|怎么|怎样|如何|为什么|为何|可以|需要|应该|"
    r"包括|主要|最|出口|进口|生产|实行|信仰|加入|举办|发生|适合|适用|支持)"
)
_TOPIC_HEAD = re.compile(
    r"^(?:请问|请|那么|那|而)?(?P<topic>[^，。？！,?!\s的]{2,14}?(?:和[^，。？！,?!\s的]{2,8}?)?)(?:的|(?="
    + _VERB
    + r"))"
)
_DEFINED = re.compile(
    r"^(?:请问|请)?(?:什么是|何为|介绍一下|介绍|解释一下|解释|说说|讲讲|谁是)(?P<topic>[^，。？！,?!的是]{1,16}?)"
    + _END
)
_DESCRIBED = re.compile(r"^(?:请问)?(?P<topic>[^，。？！,?!的]{1,16}?)是(?:什么|谁|哪位|什么意思|啥)" + _END)
MAX_CHARACTERS = 120
"""A longer message explains itself."""


def is_small_talk(text: str) -> bool:
    """Whether a turn says nothing that a later one could refer to."""
    return (
        re.fullmatch(
            r"(?:谢谢|多谢|好的?|行|可以|不错|明白了?|知道了|你好|您好|嗨|是的?|不是|对|嗯|哦|再见)[^？?]{0,8}",
            text.strip(),
        )
        is not None
    )


def resolve(question: str, earlier: Earlier) -> str:
    """What `question` means after `earlier`; `question` itself where it stands alone or nothing is sure."""
    asked = question.strip()
    if len(asked) > MAX_CHARACTERS or is_small_talk(asked):
        return question
    if re.fullmatch(r"(?:那|那么)?(?:是)?为(?:什么|何)(?:呢)?" + _END, asked):
        return _why(earlier) or question
    named = _without_pronouns(asked, earlier)
    if named != asked:
        return _asking(named)
    fragment = re.fullmatch(r"(?P<thing>[^，。！!,？?]{1,16}?)呢" + _END, _LEAD.sub("", asked))
    if fragment:
        return _of_another(fragment["thing"].strip(), earlier) or question
    return question


def _without_pronouns(asked: str, earlier: Earlier) -> str:
    """The question with the topic for its pronoun; as it is where there is none, or what it means is unsure."""
    topic = _topic(earlier)
    if not topic:
        return asked
    if its := _ITS.match(asked):
        return f"{_LEAD.sub('', its[0][:-1])}{topic}的{asked[its.end() :]}"
    pronoun = _PRONOUN.search(asked)
    if pronoun is None or not _BEFORE_PRONOUN.match(asked[: pronoun.start()]):
        return asked
    word = pronoun[0]
    if word in ("他", "她", "他的", "她的"):
        topic = _person(topic, earlier.question)
        if not topic:
            return asked
    elif word == "它" and not asked[: pronoun.start()].endswith(("与", "和", "跟", "到", "去", "对")):
        topic = _property(topic, earlier.question)
    before = _LEAD.sub("", asked[: pronoun.start()])
    return f"{before}{topic}{'的' if word.endswith('的') else ''}{asked[pronoun.end() :]}"


def _property(topic: str, asked: str) -> str:
    """`希腊的首都`, where the earlier question asks for it: 它 may mean it or 希腊, and the whole names both."""
    found = re.match(rf"{re.escape(topic)}的[^的，。？?]{{1,8}}?(?=是(?!哪些)|在|怎|如何)", asked)
    return found[0] if found else topic


def _asking(text: str) -> str:
    """`希腊的人口呢？` as a whole question."""
    attribute = re.fullmatch(r"(?P<of>.+的)(?P<noun>[^的呢]+)呢?" + _END, text)
    is_fragment = re.search("呢" + _END, text) or re.search(rf"的(?:{_COUNTED}|{_PEOPLE}|{_ATTRIBUTES}){_END}", text)
    if attribute is None or not is_fragment or _NO_TOPIC.search(attribute["noun"]):
        return text
    return f"{attribute['of']}{attribute['noun']}{_what(attribute['noun'])}？"


def _what(noun: str) -> str:
    if re.search(_COUNTED + "$", noun):
        return "是多少"
    return "是谁" if re.search(_PEOPLE + "$", noun) else "是什么"


def _of_another(thing: str, earlier: Earlier) -> str:
    """The earlier question about another thing, another year, or another attribute; empty where no rule is sure."""
    topic, asked = _topic(earlier), earlier.question
    if year := _YEAR.fullmatch(re.sub(r"^在", "", thing)):
        if known := _YEAR.search(asked):
            return asked[: known.start()] + year[0] + asked[known.end() :]
        return f"{year[0]}{asked}" if topic else ""
    if not topic or _NO_TOPIC.search(thing) or thing == topic:
        return ""
    if re.fullmatch(rf"(?:.{{0,4}}(?:的)?)?(?:{_COUNTED}|{_PEOPLE}|{_ATTRIBUTES})", thing):
        own = thing.removeprefix(topic).removeprefix("的")
        return "" if "的" in own else f"{topic}的{own}{_what(own)}？"
    if "的" in thing or thing[-1] in _NOUN_ENDINGS or len(thing) > 12 or re.search(r"比|区别|不同|差异", asked):
        return ""
    thing = re.sub(r"^(?:在|对|对于|关于)(?=.{2})", "", thing)
    return asked.replace(topic, thing, 1)


def _why(earlier: Earlier) -> str:
    """`为什么？` after a yes-or-no question that was not denied."""
    yes_or_no = re.fullmatch(r"(.{3,}?)吗" + _END, earlier.question)
    return f"为什么{yes_or_no[1]}？" if yes_or_no and not re.match("不|没|否", earlier.answer) else ""


def _topic(earlier: Earlier) -> str:
    """What the earlier question is about; empty where that is unsure."""
    asked = earlier.question.strip()
    for pattern in (_DEFINED, _DESCRIBED):
        if (found := pattern.match(asked)) and not _NO_TOPIC.search(found["topic"]):
            return found["topic"]
    without_year = _YEAR.sub("", asked).removeprefix("，").removeprefix("在")
    if (found := _TOPIC_HEAD.match(without_year)) and not _NO_TOPIC.search(found["topic"]):
        return found["topic"]
    titles = [title for title in earlier.titles if title in asked]
    return titles[0] if len(titles) == 1 else ""


def _person(topic: str, asked: str) -> str:
    """Whom `他` and `她` mean: the holder of an office that the question names, or whom it is about."""
    if office := re.search(rf"{re.escape(topic)}的?{_PEOPLE}", asked):
        return office[0]
    return topic if re.search(r"谁|哪位|出生|去世|逝世|多少岁|多大年纪|" + _PEOPLE + "$", asked + topic) else ""
