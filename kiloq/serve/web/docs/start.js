// Shows the API of the server that this page comes from. No validator: it would send the description elsewhere.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", validatorUrl: null, deepLinking: true });
