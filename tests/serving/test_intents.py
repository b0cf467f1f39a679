import numpy as np
import pytest

from cluster.errors import ArtifactError
from cluster.stage import Outcome, Plan, run_stage
from serving.intents import KeywordIntents, TrainedIntents, open_classifier, query_encoder
from serving.router_config import DEFAULT_INTENTS
from training.intent_model import IntentModel

FACTS, REASONING, ANALYSIS = "fact_lookup", "reasoning", "analysis"
# Thirty of each language that the keywords were improved on.
CHINESE = [
    ("马耳他的首都在哪里？", FACTS),
    ("这个产品的保修期是多久？", FACTS),
    ("公司成立于哪一年？", FACTS),
    ("谁是法国现任总统？", FACTS),
    ("长江有多长？", FACTS),
    ("请问贵公司的营业时间是几点到几点？", FACTS),
    ("退货的截止日期是哪天？", FACTS),
    ("订单多少钱可以免运费？", FACTS),
    ("什么叫做检索增强生成？", FACTS),
    ("阿司匹林的推荐剂量是多少？", FACTS),
    ("列出支持的支付方式", FACTS),
    ("卢森堡的官方语言有哪些？", FACTS),
    ("为什么天空是蓝色的？", REASONING),
    ("请解释一下为何要先退火再回火", REASONING),
    ("这台打印机怎么总是卡纸？", REASONING),
    ("如果利率上升，债券价格会怎样变化？", REASONING),
    ("推导一下贝叶斯公式", REASONING),
    ("这个结论是怎么得出来的？", REASONING),
    ("导致系统崩溃的原因是什么？", REASONING),
    ("怎样证明根号二是无理数？", REASONING),
    ("凭什么说这个方案更安全？", REASONING),
    ("设备无法启动，该怎么排查？", REASONING),
    ("比较一下马耳他和塞浦路斯的经济", ANALYSIS),
    ("RAG和微调有什么区别？", ANALYSIS),
    ("分析近五年的人口变化趋势", ANALYSIS),
    ("这两款手机哪个更适合老人？", ANALYSIS),
    ("全款和分期各有什么利弊？", ANALYSIS),
    ("评估一下这个方案的风险", ANALYSIS),
    ("云部署和本地部署相比有哪些优缺点？", ANALYSIS),
    ("总结一下这份报告的主要观点", ANALYSIS),
]
ENGLISH = [
    ("What is the capital of Malta?", FACTS),
    ("Who founded the company?", FACTS),
    ("When does the warranty expire?", FACTS),
    ("Where can I find the serial number?", FACTS),
    ("How many employees does the firm have?", FACTS),
    ("Which countries border Austria?", FACTS),
    ("How tall is Mont Blanc?", FACTS),
    ("What's the recommended dose of aspirin?", FACTS),
    ("Name the official languages of Luxembourg.", FACTS),
    ("Is there parking at the hotel?", FACTS),
    ("How far is the Moon from Earth?", FACTS),
    ("Tell me the opening hours of the library.", FACTS),
    ("Why is the sky blue?", REASONING),
    ("Explain how a vaccine works.", REASONING),
    ("What would happen if interest rates doubled?", REASONING),
    ("How come the printer keeps jamming?", REASONING),
    ("Derive Bayes' theorem.", REASONING),
    ("What causes inflation?", REASONING),
    ("My router won't connect; how do I fix it?", REASONING),
    ("Prove that the square root of two is irrational.", REASONING),
    ("How does photosynthesis work?", REASONING),
    ("What is the reason for the delay?", REASONING),
    ("Compare the economies of Malta and Cyprus.", ANALYSIS),
    ("What is the difference between RAG and fine-tuning?", ANALYSIS),
    ("What are the pros and cons of leasing a car?", ANALYSIS),
    ("Analyse population trends over the last five years.", ANALYSIS),
    ("Which is better for elderly people, phone A or phone B?", ANALYSIS),
    ("Evaluate the risks of this plan.", ANALYSIS),
    ("Summarize the main points of the report.", ANALYSIS),
    ("How do the two contracts differ?", ANALYSIS),
]
# Written afterwards; the keywords were not changed for them.
UNSEEN = [
    ("上海中心大厦有多少层？", FACTS),
    ("你们支持七天无理由退货吗？", FACTS),
    ("世界上最深的湖叫什么名字？", FACTS),
    ("哥伦布何时到达美洲？", FACTS),
    ("请告诉我客服电话", FACTS),
    ("这款药孕妇可以服用吗？", FACTS),
    ("水为何在零度结冰？", REASONING),
    ("手机充不进电怎么办？", REASONING),
    ("说说疫苗起作用的机制", REASONING),
    ("要是明天下雨，活动会受什么影响？", REASONING),
    ("从A大于B和B大于C能推断出什么？", REASONING),
    ("对比苹果和安卓系统", ANALYSIS),
    ("这个政策对中小企业的利弊", ANALYSIS),
    ("概述一下量子计算的发展", ANALYSIS),
    ("坐高铁和坐飞机哪个更划算？", ANALYSIS),
    ("对这份财报做个评价", ANALYSIS),
    ("Who wrote Hamlet?", FACTS),
    ("Does the plan cover dental work?", FACTS),
    ("What time does the store close?", FACTS),
    ("Can I bring a dog?", FACTS),
    ("Population of Iceland?", FACTS),
    ("How often should filters be replaced?", FACTS),
    ("Walk me through how to reset my password.", REASONING),
    ("Why do leaves change colour in autumn?", REASONING),
    ("If demand rises, how would prices react?", REASONING),
    ("What caused the outage last night?", REASONING),
    ("Show that the sum of two odd numbers is even.", REASONING),
    ("Contrast the two insurance plans.", ANALYSIS),
    ("Give an overview of renewable energy in Europe.", ANALYSIS),
    ("Is it better to rent or to buy?", ANALYSIS),
    ("Assess the impact of remote work.", ANALYSIS),
    ("Summarise the main arguments of the paper.", ANALYSIS),
]


def guessed(questions):
    keywords = KeywordIntents(DEFAULT_INTENTS)
    return [(question, keywords.classify(question).intent) for question, _ in questions]


@pytest.mark.parametrize("questions", [CHINESE, ENGLISH], ids=["zh", "en"])
def test_keywords_tell_the_tiers_of_varied_questions(questions):
    assert len(questions) == 30
    assert guessed(questions) == questions


def test_keywords_tell_the_tiers_of_unseen_questions_mostly():
    right = sum(found == wanted for found, wanted in zip(guessed(UNSEEN), UNSEEN, strict=True))
    assert right / len(UNSEEN) > 0.85


def test_keywords_overlapping_count_once_and_the_share_is_the_confidence():
    found = KeywordIntents({"a": ("什么", "是什么"), "b": ("区别", "什么区别", "比")}).classify("比一比，是什么区别")
    assert (found.intent, found.confidence, found.how) == ("b", 2 / 3, "recognised by “比”, “什么区别”")
    assert KeywordIntents({"a": ()}).classify("anything").intent == ""


def model(**changes):
    values = {
        "labels": ("balance", "oos", "transfer"),
        "out_of_scope": "oos",
        "features": "embedding",
        "weights": np.eye(3, dtype=np.float32) * 4,
        "bias": np.zeros(3, dtype=np.float32),
        "threshold": 0.6,
        "encoder": "tiny",
        "encoder_digest": "d1",
    }
    return IntentModel(**{**values, **changes})


def published(store, kind, write, measured=None):
    def build(attempt):
        write(attempt.directory)
        return Outcome(measured=measured or {})

    return run_stage(store, Plan(kind, "x"), build)


def index_of(store, digest):
    measured = {"encoder": "other", "encoder_digest": digest}
    return published(store, "index", lambda folder: (folder / "f").write_text("x"), measured)


def test_trained_intents_know_confident_questions_and_say_what_they_took_others_for():
    intents = TrainedIntents(model())
    sure = intents.classify("x", np.array([1, 0, 0], dtype=np.float32))
    assert (sure.intent, sure.how) == ("balance", "recognised as balance with confidence 0.96")
    unsure = intents.classify("x", np.array([0.72, 0, 0.69], dtype=np.float32))
    assert (unsure.intent, unsure.label) == ("", "balance") and unsure.confidence < 0.6
    outside = intents.classify("x", np.array([0, 1, 0], dtype=np.float32))
    assert outside.intent == "" and "only 0.02" in outside.how
    assert intents.intents == ("balance", "transfer") and intents.needs_embedding


def test_trained_intents_threshold_of_the_recipe_counts_but_out_of_scope_stays_unknown():
    close = np.array([0.7, 0, 0.72], dtype=np.float32)
    assert TrainedIntents(model()).classify("x", close).intent == ""
    assert TrainedIntents(model(), 0.1).classify("x", close).intent == "transfer"
    assert TrainedIntents(model(), 0.0).classify("x", np.array([0.5, 0.6, 0], dtype=np.float32)).intent == ""


def test_open_classifier_refuses_the_embeddings_of_another_encoder(store):
    router = published(store, "router", model().save)
    with pytest.raises(
        ArtifactError, match=r"reads embeddings by tiny \(d1\), but index/x/\w+ embeds with other \(d2\)"
    ):
        open_classifier(router, index_of(store, "d2"))
    with pytest.raises(ArtifactError, match=r"by tiny .*, but nothing here embeds: run `rayft train router RECIPE`"):
        open_classifier(router)


def test_open_classifier_takes_its_own_encoder_and_the_recipes_threshold(store):
    index = index_of(store, "d1")
    opened = open_classifier(published(store, "router", model().save), index, threshold=0.3)
    assert opened.threshold == 0.3 and query_encoder(index) == ("other", "d1")
    assert opened.classify("x", np.array([0, 0, 1], dtype=np.float32)).intent == "transfer"


def test_open_classifier_refuses_files_that_do_not_fit(store):
    router = published(store, "router", model(bias=np.zeros(2, dtype=np.float32)).save)
    with pytest.raises(ArtifactError, match="its weights do not fit its labels"):
        open_classifier(router, index_of(store, "d1"))


def test_scores_of_another_dimension_are_refused():
    with pytest.raises(ArtifactError, match=r"of 3 dimensions .tiny., found 2"):
        TrainedIntents(model()).classify("x", np.zeros(2, dtype=np.float32))
