"""The generator of kiloq-mini's own data: stories, drills, dialogues and tool calls in Chinese, English and Korean."""
