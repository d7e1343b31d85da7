// Render Go templates as Ollama does: standard input is [{"template": ..., "system": ..., "messages": [...]}, ...],
// standard output the texts. Ollama gives a template .System (the system messages' texts) and .Messages (all of them).
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type job struct {
	Template, System string
	Messages         []message
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, one := range jobs {
		var text strings.Builder
		made := template.Must(template.New("").Parse(one.Template))
		if err := made.Execute(&text, map[string]any{"System": one.System, "Messages": one.Messages}); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
