// The page's own words, in English and Chinese. In: a key and values. Out: text; never markup.

const EN = {
  skip: "Skip to the question",
  mode: "Mode", one: "One answer", compare: "Compare", strategy: "Strategy",
  chosen: "Strategies to compare (up to five)",
  fresh: "New conversation", key: "API key",
  key_text: "Kept in this tab until it is closed, and sent to this server only.",
  key_needed: "This server asks for an API key.",
  key_refused: "The server did not accept this key.",
  cancel: "Cancel", save: "Use this key",
  welcome: "Ask the documents",
  welcome_text: "Answers cite the passage they come from. Open a number to read it.",
  conversation: "Conversation", passage: "Passage", close: "Close the passage (Esc)",
  question: "Your question", placeholder: "Ask a question", send: "Ask", stop: "Stop",
  hint: "Enter asks, Shift+Enter starts a new line",
  you: "You asked", answered_by: "Answer by {strategy}",
  waiting: "Answering", answered: "Answered in {time}", seconds: "{n} s", milliseconds: "{n} ms",
  standalone: "Understood as: {question}",
  abstained: "No answer: the passages do not support one",
  cut: "Cut off at the length limit",
  uncited: "From the model's own knowledge, without a source",
  unverified: "Quotes that stand in no passage: do not take them as sources",
  sources: "Sources", source: "Source {n}: {title}", unverified_quote: "Unverified quote",
  asked_for: "asked for", route: "Route", reason: "Reason", intent: "Intent", intent_value: "intent {intent} ({confidence})", confidence: "Confidence",
  propensity: "Drawn with probability", experiment: "Experiment",
  release: "Release", tokens: "Tokens", tokens_value: "{prompt} in, {completion} out",
  first_words: "First words", retrieval: "Retrieval", queue: "Queue", generation: "Generation", total: "Total",
  how: "How it was answered", unknown: "unknown",
  passages: "Passages shown to the model", left_out: "{n} more found, left out: they did not fit the model's context",
  reasoning: "Reasoning",
  copy: "Copy answer", copied: "Copied", copy_failed: "The browser did not allow copying",
  good: "Good answer", bad: "Bad answer", correct: "Correct it",
  correction: "What should it have said?", send_correction: "Send correction",
  thanks: "Thank you: stored", feedback_failed: "Not stored: {message}",
  retry: "Try again", retry_in: "Try again in {n} s",
  stopped: "Stopped: the answer is incomplete",
  incomplete: "The answer is incomplete: the connection ended before the server was done",
  broken: "The answer is incomplete: {message}",
  network: "The server cannot be reached",
  busy: "The server is busy: {message}",
  failed: "The server could not answer ({status}): {message}",
  unanswered: "The server could not answer: {message}",
  refused: "The request was refused ({status}): {message}",
  no_models: "The server offers no strategy",
  unknown_error: "no reason given",
  where: "Characters {start} to {end}", section: "Section", address: "Address", document: "Document",
  quoted: "Quoted in the answer", verified: "Verified: the quote stands in this passage",
  not_found: "This quote stands in none of the passages that the model was shown.",
  rank: "Hit {rank}, score {score}",
  choose_one: "Choose at least one strategy",
  about_auto: "chosen per question by the router",
  about_base: "base model, no passages",
  about_rag: "base model with passages",
  about_rag_fewshot: "base model with passages and examples",
  about_finetuned: "fine-tuned model, no passages",
  about_finetuned_rag: "fine-tuned model with passages",
  about_raft: "RAFT model, cites its passages",
  about_hybrid: "RAFT and fine-tuned side by side",
};

const ZH = {
  skip: "跳到提问框",
  mode: "模式", one: "单一回答", compare: "对比", strategy: "策略",
  chosen: "选择要对比的策略（最多五个）",
  fresh: "新对话", key: "API 密钥",
  key_text: "仅保存在当前标签页，关闭后即清除，只发送给本服务器。",
  key_needed: "此服务器需要 API 密钥。",
  key_refused: "服务器不接受此密钥。",
  cancel: "取消", save: "使用此密钥",
  welcome: "向文档提问",
  welcome_text: "回答会注明所依据的段落，点击编号即可查看原文。",
  conversation: "对话", passage: "段落", close: "关闭段落（Esc）",
  question: "您的问题", placeholder: "请输入问题", send: "提问", stop: "停止",
  hint: "按 Enter 提问，Shift+Enter 换行",
  you: "您的问题", answered_by: "{strategy} 的回答",
  waiting: "正在回答", answered: "用时 {time}", seconds: "{n} 秒", milliseconds: "{n} 毫秒",
  standalone: "理解为：{question}",
  abstained: "无法回答：段落中没有依据",
  cut: "已达长度上限，回答被截断",
  uncited: "来自模型自身的知识，没有出处",
  unverified: "以下引文未在段落中找到，不能视为出处",
  sources: "出处", source: "出处 {n}：{title}", unverified_quote: "未核实的引文",
  asked_for: "由用户指定", route: "路由", reason: "原因", intent: "意图", intent_value: "意图 {intent}（{confidence}）", confidence: "置信度",
  propensity: "抽取概率", experiment: "实验",
  release: "版本", tokens: "词元", tokens_value: "输入 {prompt}，输出 {completion}",
  first_words: "首字", retrieval: "检索", queue: "排队", generation: "生成", total: "总计",
  how: "回答过程", unknown: "未知",
  passages: "提供给模型的段落", left_out: "另有 {n} 个段落因超出模型上下文而未使用",
  reasoning: "推理",
  copy: "复制回答", copied: "已复制", copy_failed: "浏览器不允许复制",
  good: "回答得好", bad: "回答不好", correct: "更正",
  correction: "正确的回答应该是什么？", send_correction: "提交更正",
  thanks: "谢谢，已保存", feedback_failed: "未能保存：{message}",
  retry: "重试", retry_in: "{n} 秒后重试",
  stopped: "已停止：回答不完整",
  incomplete: "回答不完整：服务器尚未完成，连接已中断",
  broken: "回答不完整：{message}",
  network: "无法连接服务器",
  busy: "服务器繁忙：{message}",
  failed: "服务器无法回答（{status}）：{message}",
  unanswered: "服务器无法回答：{message}",
  refused: "请求被拒绝（{status}）：{message}",
  no_models: "服务器没有可用的策略",
  unknown_error: "未说明原因",
  where: "第 {start} 至 {end} 个字符", section: "章节", address: "地址", document: "文档",
  quoted: "回答中引用", verified: "已核实：引文出自此段落",
  not_found: "此引文未出现在提供给模型的任何段落中。",
  rank: "第 {rank} 个结果，得分 {score}",
  choose_one: "请至少选择一个策略",
  about_auto: "由路由器按问题选择",
  about_base: "基础模型，无段落",
  about_rag: "基础模型加段落",
  about_rag_fewshot: "基础模型加段落和示例",
  about_finetuned: "微调模型，无段落",
  about_finetuned_rag: "微调模型加段落",
  about_raft: "RAFT 模型，引用段落",
  about_hybrid: "RAFT 与微调模型并行",
};

const chinese = (navigator.language || "").toLowerCase().startsWith("zh");
const words = chinese ? ZH : EN;

export const language = chinese ? "zh" : "en";
export const dictionaries = { EN, ZH };

/** The text of `key` with `{name}` replaced by `values.name`. */
export function t(key, values = {}) {
  return (words[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));
}

/** Whether there are words for `key`. */
export const has = (key) => key in words;

/** Milliseconds, as a person reads them. */
export function duration(ms) {
  return ms < 1000 ? t("milliseconds", { n: Math.round(ms) }) : t("seconds", { n: (ms / 1000).toFixed(1) });
}

/** Writes the dictionary into the elements that name a key. */
export function translate(root) {
  document.documentElement.lang = language;
  for (const node of root.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  for (const node of root.querySelectorAll("[data-label]")) node.setAttribute("aria-label", t(node.dataset.label));
  for (const node of root.querySelectorAll("[data-placeholder]")) node.placeholder = t(node.dataset.placeholder);
}
