// Every word that the page says, in English, Chinese and Korean. {name} is filled in.

import { preference, setPreference } from "./store.js";

export const LANGUAGES = { en: "English", zh: "中文", ko: "한국어" };
const TAGS = { en: "en", zh: "zh-CN", ko: "ko" };

export const TEXTS = {
  newChat: ["New chat", "新对话", "새 대화"],
  conversations: ["Conversations", "对话列表", "대화 목록"],
  openSidebar: ["Show conversations", "显示对话列表", "대화 목록 보기"],
  closeSidebar: ["Hide conversations", "隐藏对话列表", "대화 목록 닫기"],
  untitled: ["New chat", "新对话", "새 대화"],
  noChats: ["Nothing here yet.", "还没有对话。", "아직 대화가 없습니다."],
  today: ["Today", "今天", "오늘"],
  week: ["Last 7 days", "最近 7 天", "지난 7일"],
  older: ["Older", "更早", "이전"],
  actionsFor: ["Actions for “{title}”", "“{title}”的操作", "“{title}” 작업"],
  rename: ["Rename", "重命名", "이름 바꾸기"],
  renameLabel: ["Name of the conversation", "对话名称", "대화 이름"],
  remove: ["Delete", "删除", "삭제"],
  removed: ["“{title}” was deleted.", "已删除“{title}”。", "“{title}”을(를) 삭제했습니다."],
  undo: ["Undo", "撤销", "되돌리기"],
  exportOne: ["Export", "导出", "내보내기"],
  exportAll: ["Export all", "全部导出", "모두 내보내기"],
  importFile: ["Import", "导入", "가져오기"],
  imported: ["{count} imported.", "已导入 {count} 个对话。", "{count}개를 가져왔습니다."],
  importBad: ["This file holds no conversations of kiloq.", "此文件不包含 kiloq 的对话。", "이 파일에는 kiloq 대화가 없습니다."],
  language: ["Language", "语言", "언어"],
  theme: ["Colours: {name}", "配色：{name}", "색상: {name}"],
  auto: ["as the system", "跟随系统", "시스템 설정"],
  light: ["light", "浅色", "밝게"],
  dark: ["dark", "深色", "어둡게"],
  model: ["Model", "模型", "모델"],
  settings: ["Settings", "设置", "설정"],
  settingsOf: ["Settings of this conversation", "本次对话的设置", "이 대화의 설정"],
  done: ["Done", "完成", "완료"],
  system: ["System prompt", "系统提示词", "시스템 프롬프트"],
  systemHint: ["What the model should know or be.", "告诉模型它的角色或背景。", "모델의 역할이나 배경을 적습니다."],
  sampling: ["Sampling", "采样", "샘플링"],
  samplingHint: ["Empty fields follow the model.", "留空则使用模型的默认值。", "비워 두면 모델의 기본값을 씁니다."],
  temperature: ["Temperature", "温度", "온도"],
  topP: ["Top p", "Top p", "Top p"],
  topK: ["Top k", "Top k", "Top k"],
  maxTokens: ["Longest answer (tokens)", "最大回答长度（词元）", "최대 답변 길이(토큰)"],
  repetition: ["Repetition penalty", "重复惩罚", "반복 페널티"],
  seed: ["Seed", "随机种子", "시드"],
  asModel: ["model’s own", "模型默认", "모델 기본값"],
  outOfRange: ["From {min} to {max}.", "范围：{min} 至 {max}。", "{min}에서 {max} 사이."],
  atLeast: ["A whole number from {min}.", "不小于 {min} 的整数。", "{min} 이상의 정수."],
  thinking: ["Thinking first", "先思考", "먼저 생각하기"],
  on: ["on", "开", "켬"],
  off: ["off", "关", "끔"],
  tools: ["Tools", "工具", "도구"],
  toolsHint: [
    "Functions in OpenAI’s JSON form. When the model calls one, you type its result.",
    "OpenAI JSON 格式的函数。模型调用时，由你填写结果。",
    "OpenAI JSON 형식의 함수. 모델이 호출하면 결과를 직접 입력합니다.",
  ],
  toolsBad: [
    "This is not JSON with a name for each tool; it is not used.",
    "这不是有效的 JSON，或有工具缺少名称；未被使用。",
    "올바른 JSON이 아니거나 이름 없는 도구가 있어 사용하지 않습니다.",
  ],
  asDefaults: ["Use for new conversations", "用于新对话", "새 대화에 사용"],
  asDefaultsDone: ["New conversations begin with these settings.", "新对话将使用这些设置。", "새 대화는 이 설정으로 시작합니다."],
  reset: ["Reset", "重置", "초기화"],
  keyTitle: ["This server wants a key", "此服务器需要密钥", "서버에 키가 필요합니다"],
  keyLabel: ["API key", "API 密钥", "API 키"],
  keyHint: ["It is kept until this tab is closed.", "密钥只保留到关闭此标签页为止。", "이 탭을 닫을 때까지만 보관됩니다."],
  keyBad: ["The server did not accept this key.", "服务器不接受此密钥。", "서버가 이 키를 받아들이지 않았습니다."],
  use: ["Continue", "继续", "계속"],
  cancel: ["Cancel", "取消", "취소"],
  greeting: ["What is on your mind?", "想聊些什么？", "무엇이 궁금하신가요?"],
  privacy: [
    "The model runs on this server. Conversations stay in this browser.",
    "模型在此服务器上运行，对话保存在此浏览器中。",
    "모델은 이 서버에서 실행되고, 대화는 이 브라우저에 남습니다.",
  ],
  ask: ["Message", "消息", "메시지"],
  askHint: ["Ask anything", "输入消息", "메시지를 입력하세요"],
  keysHint: ["Enter sends, Shift + Enter begins a new line", "Enter 发送，Shift + Enter 换行", "Enter 전송, Shift + Enter 줄바꿈"],
  send: ["Send", "发送", "보내기"],
  stop: ["Stop", "停止", "중지"],
  toLatest: ["To the latest", "回到最新", "최신으로"],
  skip: ["Skip to the message field", "跳到输入框", "입력창으로 건너뛰기"],
  transcript: ["Conversation", "对话内容", "대화 내용"],
  you: ["You", "你", "나"],
  answer: ["Answer", "回答", "답변"],
  edit: ["Edit", "编辑", "수정"],
  editLabel: ["Edit the message", "编辑消息", "메시지 수정"],
  editHint: ["What follows it is replaced.", "其后的内容将被替换。", "이후의 내용은 대체됩니다."],
  resend: ["Send again", "重新发送", "다시 보내기"],
  copy: ["Copy", "复制", "복사"],
  copyCode: ["Copy the code", "复制代码", "코드 복사"],
  code: ["Code", "代码", "코드"],
  table: ["Table", "表格", "표"],
  raw: ["Show as plain text", "显示原文", "원문 보기"],
  regenerate: ["Answer again", "重新回答", "다시 답하기"],
  reasoning: ["Thoughts", "思考过程", "생각"],
  reasoningNow: ["Thinking", "思考中", "생각하는 중"],
  calls: ["Calls {name}", "调用 {name}", "{name} 호출"],
  result: ["Result of {name}", "{name} 的结果", "{name} 결과"],
  resultLabel: ["Result of {name}", "{name} 的结果", "{name} 결과"],
  sendResults: ["Send results", "发送结果", "결과 보내기"],
  waiting: ["Waiting for the answer", "等待回答", "답변 기다리는 중"],
  stopped: ["Stopped.", "已停止。", "중지했습니다."],
  cutOff: ["The answer was cut off.", "回答被中断。", "답변이 끊겼습니다."],
  tooLong: ["The longest answer that was allowed ends here.", "已达到回答长度上限。", "허용된 최대 길이에 도달했습니다."],
  empty: ["The model answered nothing.", "模型没有回答。", "모델이 아무 답도 하지 않았습니다."],
  statTokens: ["{count} tokens", "{count} 词元", "{count} 토큰"],
  statSpeed: ["{count} tokens/s", "{count} 词元/秒", "{count} 토큰/초"],
  statFirst: ["first after {count} s", "首词元 {count} 秒", "첫 토큰 {count}초"],
  statPrompt: ["prompt {count}", "提示 {count}", "프롬프트 {count}"],
  statCached: ["prompt {count}, {cached} of it cached", "提示 {count}，其中缓存 {cached}", "프롬프트 {count}(캐시 {cached})"],
  offline: ["The server does not answer. Is it still running?", "服务器没有响应。它还在运行吗？", "서버가 응답하지 않습니다. 실행 중인가요?"],
  problem: ["The server refused: {message}", "服务器拒绝：{message}", "서버가 거절했습니다: {message}"],
  failed: ["The server failed: {message}", "服务器出错：{message}", "서버 오류: {message}"],
  busy: ["The server is busy.", "服务器繁忙。", "서버가 바쁩니다."],
  retryIn: ["Trying again in {count} s", "{count} 秒后重试", "{count}초 후 다시 시도"],
  retry: ["Try again", "重试", "다시 시도"],
  unanswered: ["Not answered yet.", "尚未回答。", "아직 답변이 없습니다."],
  notKept: [
    "This browser keeps nothing for this page: conversations end with the tab.",
    "此浏览器不为本页保存数据：关闭标签页后对话会丢失。",
    "이 브라우저는 데이터를 보관하지 않습니다. 탭을 닫으면 대화가 사라집니다.",
  ],
  full: [
    "The browser has no room left for conversations. Export them, then delete some.",
    "浏览器的存储空间已满。请先导出，再删除一些对话。",
    "브라우저 저장 공간이 가득 찼습니다. 내보낸 뒤 일부를 삭제하세요.",
  ],
  dismiss: ["Dismiss", "关闭", "닫기"],
};

let language = preference("language", null) ?? fromBrowser();

function fromBrowser() {
  for (const tag of navigator.languages ?? []) {
    const code = tag.slice(0, 2).toLowerCase();
    if (code in LANGUAGES) return code;
  }
  return "en";
}

export const currentLanguage = () => language;

export function setLanguage(code) {
  language = code;
  setPreference("language", code);
}

export function t(name, values = {}) {
  const text = TEXTS[name][Object.keys(LANGUAGES).indexOf(language)];
  return text.replace(/\{(\w+)\}/g, (_, key) => String(values[key]));
}

export function formatNumber(value, digits = 0) {
  return new Intl.NumberFormat(TAGS[language], { maximumFractionDigits: digits }).format(value);
}

// Fills in the fixed parts of the page: data-t is an element's text, data-t-label its name for screen readers.
export function translatePage() {
  document.documentElement.lang = TAGS[language];
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-t-label]")) {
    node.setAttribute("aria-label", t(node.dataset.tLabel));
    if (node.matches("button, select")) node.title = t(node.dataset.tLabel);
  }
  for (const node of document.querySelectorAll("[data-t-placeholder]")) node.placeholder = t(node.dataset.tPlaceholder);
}
